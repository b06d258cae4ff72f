"""Run by `torch.distributed.run` as two processes on gloo; each writes what it measured."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from tests.experts.training.runs import ROWS, config, lower_half, model, tokenizer, z_of
from tests.training.two_processes_sharded import gate_lifted, is_shard
from transformers import TrainerCallback

from pliant.experts.training.run import train_expert
from pliant.experts.training.trainer import RewardMixin

OUT = Path(sys.argv[1])
STEPS = {"steps": 3, "prompts": 3, "group": 4}
"""Six answers a process, so that a group of four is divided."""


class Watch(TrainerCallback):
    """Reads the model between two steps."""

    seen: dict[str, Any]

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        Watch.seen = {"sharded": any(map(is_shard, model.parameters()))}


def run(folder: Path, resume: bool = False, **settings: Any) -> Any:
    init = RewardMixin.__init__

    def watched(self: Any, *args: Any, **more: Any) -> None:
        init(self, *args, **more)
        self.add_callback(Watch())

    RewardMixin.__init__ = watched  # type: ignore[method-assign]
    try:
        return train_expert(
            model(),
            tokenizer(),
            ROWS,
            lower_half,
            config(**STEPS),
            folder=folder,
            resume=resume,
            settings=settings,
            say=lambda line: None,
        )
    finally:
        RewardMixin.__init__ = init  # type: ignore[method-assign]


def saved(folder: Path) -> torch.Tensor:
    dist.barrier()
    z = z_of(PeftModel.from_pretrained(model(), str(folder)))
    return torch.cat([z[name] for name in sorted(z)])


def agree(tensor: torch.Tensor) -> bool:
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor.contiguous())
    return torch.equal(*both)


def trained(results: dict[str, bool], name: str, **settings: Any) -> None:
    whole = run(OUT / name, **settings)
    z = saved(OUT / name)
    results[f"{name}: it moved"] = bool(z.any()) and bool(torch.isfinite(z).all())
    results[f"{name}: sharded"] = Watch.seen["sharded"] == ("fsdp" in settings)
    results[f"{name}: both measured the same"] = agree(torch.tensor(whole.after.value))
    if "fsdp" not in settings:
        return
    for path in (OUT / name).glob("checkpoint-3/complete.json"):
        if dist.get_rank() == 0:
            path.unlink()  # as if killed before it was complete
    dist.barrier()
    run(OUT / name, resume=True, **settings)
    results[f"{name}: resumed"] = torch.equal(saved(OUT / name), z)


if __name__ == "__main__":
    facts: dict[str, bool] = {}
    trained(facts, "ddp")
    with gate_lifted():
        trained(facts, "fsdp", fsdp=True)
    (OUT / f"rank{dist.get_rank()}.json").write_text(json.dumps(facts))
    dist.barrier()  # the first to leave would cut the other off from what it still reads
    dist.destroy_process_group()
    os._exit(0)
