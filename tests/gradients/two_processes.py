"""Run by `torch.distributed.run` as two processes on gloo; each writes what it found to a file."""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.gradients.test_training import HARDEST, padded, rows, trainer
from tests.minimal_adapter import tiny_llama
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pliant.adapters import attached
from pliant.gradients import GradientConfig, attach
from pliant.gradients.training import PREFIX, SelectiveTraining

OUT = Path(sys.argv[1])
CONFIGS = {
    "exact, every": GradientConfig(engine="exact", selection="all"),
    "exact, hardest": HARDEST,
    "sparse, hardest": GradientConfig(engine="sparse", selection="topk", ratio=0.4),
    "sparse, checkpointed": GradientConfig(engine="sparse", selection="topk", ratio=0.4),
    "sparse, one hop": GradientConfig(selection="topk", ratio=0.4, kv_grad="one_hop"),
}


def no_labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.full_like(batch["labels"], -100)


def from_the_start(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


UNLIKE: dict[str, Any] = {
    "hardest": (CONFIGS["sparse, hardest"], no_labels),
    "hardest, whole": (HARDEST, no_labels),
    "uniform": (GradientConfig(engine="exact", selection="uniform", ratio=1.0), no_labels),
    "completion": (GradientConfig(engine="completion"), from_the_start),
    "completion of nothing": (GradientConfig(engine="completion"), no_labels),
}


def halves() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The joint batch, and this process's rows of it."""
    joint = padded(rows(4))
    return joint, two_halves(joint)[dist.get_rank()]


def two_halves(joint: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{k: v[2 * rank : 2 * rank + 2] for k, v in joint.items()} for rank in range(2)]


def gradient(model: nn.Module, batch: dict[str, Any], share: float, **more: Any) -> dict[str, Any]:
    model.train()
    (model(**batch, **more).loss * share).backward()
    return {
        name.replace("module.", ""): p.grad.full_tensor()
        if hasattr(p.grad, "full_tensor")
        else p.grad
        for name, p in model.named_parameters()
    }


def close(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


def wrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if how == "fsdp2, decoder as well":
        fully_shard(model.model)
    return fully_shard(model)


def same_gradient(found: dict[str, Any]) -> None:
    joint, mine = halves()
    items = (joint["labels"][:, 1:] != -100).sum()
    for name, config in CONFIGS.items():
        for how in ("ddp", "fsdp2"):
            sharded_hop = how == "fsdp2" and config.kv_grad == "one_hop"
            engine = "exact" if sharded_hop else config.engine
            alone = tiny_llama()
            attach(alone, replace(config, engine=engine))
            whole = gradient(alone, joint, 1.0)
            model = tiny_llama()
            if "checkpointed" in name:
                model.gradient_checkpointing_enable()
            gradients = attach(model, config)
            # Wrappers average over the processes: two of them, so twice the share of each.
            parts = gradient(wrapped(model, how), mine, 2.0, num_items_in_batch=items)
            found[f"{how}, {name}: as one process"] = close(parts, whole)
            found[f"{how}, {name}: by {engine}"] = gradients.engine == engine


def sharded_parts(found: dict[str, Any]) -> None:
    joint, mine = halves()
    items = (joint["labels"][:, 1:] != -100).sum()
    alone = tiny_llama()
    attach(alone, CONFIGS["sparse, hardest"])
    model = tiny_llama()
    attach(model, CONFIGS["sparse, hardest"])
    parts = gradient(wrapped(model, "fsdp2, decoder as well"), mine, 2.0, num_items_in_batch=items)
    found["a decoder sharded by itself"] = close(parts, gradient(alone, joint, 1.0))


def unlike_processes(found: dict[str, Any]) -> None:
    """One has prompts and labels, the other no labels at all, or labels from the start on: it asks
    its head another number of times, and yet none waits for the other."""
    for name, (config, labels_of_second) in UNLIKE.items():
        parts = two_halves(padded(rows(4)))
        parts[1]["labels"] = labels_of_second(parts[1])
        mine, items = parts[dist.get_rank()], sum((p["labels"][:, 1:] != -100).sum() for p in parts)
        alone = tiny_llama()
        attach(alone, config)
        whole = [gradient(alone, part, 1.0, num_items_in_batch=items) for part in parts][-1]
        for how in ("ddp", "fsdp2"):
            model = tiny_llama()
            gradients = attach(model, config)
            if how == "fsdp2":
                fully_shard(model.lm_head)
            ours = gradient(wrapped(model, how), mine, 2.0, num_items_in_batch=items)
            found[f"unlike, {how}, {name}"] = close(ours, whole)
            found[f"unlike, {how}, {name}: engine"] = gradients.engine == config.engine


def own_draws(found: dict[str, Any]) -> None:
    """Each process draws for itself: rows that are alike are not trained at the same tokens."""
    model = tiny_llama().train()
    attach(model, GradientConfig(engine="exact", selection="uniform", ratio=0.3))
    batch = padded(rows(6))
    loss = model(**batch).loss.detach().reshape(1)
    both = [torch.empty_like(loss) for _ in range(2)]
    dist.all_gather(both, loss)
    found["draws differ between processes"] = not torch.equal(*both)


def trained(found: dict[str, Any]) -> None:
    """The Trainer itself, in two processes, and resumed."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "ddp_backend": "gloo"}
    config = GradientConfig(ratio=0.4, warmup_steps=2)

    def run(**more: Any) -> Any:
        made = trainer(
            tiny_llama(),
            OUT / "run",
            callbacks=[SelectiveTraining(config)],
            data=rows(20),
            **options,
        )
        made.train(**more)
        return made

    whole = run()
    again = run(resume_from_checkpoint=str(OUT / "run" / "checkpoint-2"))
    key = PREFIX + "tokens_selected"
    one, two = ([e for e in r.state.log_history if key in e] for r in (whole, again))
    found["the trainer ran in parallel"] = whole.args.world_size == 2
    found["resumed equals uninterrupted"] = [e["loss"] for e in one] == [e["loss"] for e in two]
    weight = whole.model.lm_head.weight.detach()
    both = [torch.empty_like(weight) for _ in range(2)]
    dist.all_gather(both, weight)
    found["both have the same weights"] = torch.equal(*both)
    found["the schedule is the optimizer's"] = (
        attached(whole.model)["gradients"].selector.schedule.steps == 4
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # that one hop is not taken over shards is said, and looked at
    results: dict[str, Any] = {}
    dist.init_process_group("gloo")
    same_gradient(results)
    sharded_parts(results)
    unlike_processes(results)
    own_draws(results)
    trained(results)
    (OUT / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()  # whoever leaves first cuts the others off in what they are still reading
    dist.destroy_process_group()
    os._exit(0)  # all is done and written: a thread of torch's that still runs would abort us
