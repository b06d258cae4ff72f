"""Run by `torch.distributed.run` as two processes on a CPU: the Trainer under DeepSpeed's ZeRO.

Each stage must train as one process on the joint batches does, and go on from a checkpoint as if it
had never stopped. DeepSpeed keeps its settings for as long as a process lives: one stage a process.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.gradients.test_training import HARDEST, history, padded, rows, trainer
from tests.minimal_adapter import tiny_llama

from pliant.gradients import GradientConfig, attach
from pliant.gradients.training import SelectiveTraining

OUT, STAGE = Path(sys.argv[1]), int(sys.argv[2])
STEPS, RATE = 3, 0.1
CONFIGS = {
    "exact": HARDEST,
    "sparse": GradientConfig(selection="topk", ratio=0.4),
    "one hop": GradientConfig(selection="topk", ratio=0.4, kv_grad="one_hop"),
    "completion": GradientConfig(engine="completion"),
}
ZERO = {
    # Weights so small would otherwise stay whole in every process.
    "zero_optimization": {"stage": STAGE, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}


def run(config: GradientConfig, folder: str, again: bool = False, **options: Any) -> Any:
    made = trainer(
        tiny_llama(),
        OUT / folder,
        callbacks=[SelectiveTraining(config)],
        deepspeed=ZERO,
        max_steps=STEPS,
        gradient_accumulation_steps=2,
        learning_rate=RATE,
        data=rows(24),
        **options,
    )
    made.train(resume_from_checkpoint=again or None)
    return made


def alone(config: GradientConfig) -> list[float]:
    """A step is two parts of two rows in each of the two processes: eight rows."""
    model, losses = tiny_llama().train(), []
    attach(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        loss = model(**padded(rows(24)[8 * step : 8 * step + 8])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def same(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and all(
        abs(a - b) < 1e-5 * b for a, b in zip(one, other, strict=True)
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    found: dict[str, bool] = {}
    for name, config in CONFIGS.items():
        whole = name == "one hop" and STAGE == 3
        engine = "exact" if whole else config.engine
        expected = alone(HARDEST if whole else config)
        ran = run(config, "plain")
        gradients = ran.model.pliant.gradients
        found[f"{name}: as one process"] = same(history(ran, "loss"), expected)
        found[f"{name}: by {engine}"] = gradients.engine == engine
        found[f"{name}: steps"] = gradients.selector.schedule.steps == STEPS
    drawn = GradientConfig(ratio=0.3, warmup_steps=2)
    saving = {"save_strategy": "steps", "save_steps": 2}
    first = run(drawn, "kept", **saving)
    second = run(drawn, "kept", again=True, **saving)
    found["resumed equals uninterrupted"] = history(first, "loss") == history(second, "loss")
    found["it drew"] = 0 < history(first, "gradients/ratio")[-1] < 0.6
    found["operations are counted"] = 0 < history(first, "gradients/flops_of_standard")[-1] < 1
    found["it is parallel"] = dist.get_world_size() == 2
    (OUT / f"stage{STAGE}-rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # all is done and written: a thread of torch's that still runs would abort us
