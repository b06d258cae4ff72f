"""Run by `torch.distributed.run` as two processes on gloo; each writes what it found to a file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.complexity.training.test_trainer import losses, rows, same, scorer_on, trainer, values
from tests.minimal_adapter import tiny_llama
from torch.distributed.fsdp import fully_shard

from pliant.complexity import CPXConfig, attach
from pliant.complexity.prefix_cache.store import in_memory
from pliant.complexity.training.config import CPXTrainingConfig
from pliant.complexity.training.dataset import similar_length_order
from pliant.complexity.training.losses import loss_of
from pliant.complexity.training.train_module import TrainModule
from pliant.prefill import Batch

OUT = Path(sys.argv[1])


def agree(tensor: torch.Tensor) -> bool:
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor.detach().contiguous())
    return torch.equal(*both)


def one_process(scorer: Any) -> list[float]:
    """The losses of a plain loop over batches twice as large."""
    scorer.base.requires_grad_(False)
    scorer.requires_grad_(True)
    weight = [scorer.head.weight]
    rest = [p for p in scorer.parameters() if p is not scorer.head.weight]
    groups = [{"params": rest, "weight_decay": 0.0}, {"params": weight, "weight_decay": 0.01}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    data, found = rows(), []
    lengths = torch.tensor([len(row["input_ids"]) for row in data])
    for epoch in range(3):
        for some in torch.tensor(similar_length_order(lengths, 8, 0, epoch)).split(8):
            batch = Batch.of([data[i]["input_ids"] for i in some])
            wanted = torch.tensor([[data[i]["label"]] for i in some])
            logits = scorer.logits(batch.ids_BT, batch.mask_BT)
            loss = loss_of(logits, wanted, ("score",), CPXTrainingConfig())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return found


def data_parallel(found: dict[str, bool]) -> None:
    for prefixes in ("memory", "disk"):
        scorer = scorer_on()
        args = {"ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 4}
        run = trainer(scorer, OUT / prefixes, prefixes=prefixes, args=args)
        run.train()
        one = scorer_on()
        single = torch.tensor(one_process(one))
        found[f"{prefixes}: it ran in parallel"] = run.args.world_size == 2
        found[f"{prefixes}: both have the same scorer"] = all(map(agree, scorer.parameters()))
        both = torch.tensor(losses(run))
        found[f"{prefixes}: losses are one process's"] = torch.allclose(both, single, atol=1e-5)
        ends = zip(scorer.parameters(), one.parameters(), strict=True)
        found[f"{prefixes}: and so is the scorer"] = all(
            torch.allclose(a, b, atol=1e-4) for a, b in ends
        )
    again = trainer(scorer_on(), OUT / "disk", prefixes="disk", args=args)
    again.train(resume_from_checkpoint=str(OUT / "disk" / "checkpoint-4"))
    found["resumed equals uninterrupted"] = same(values(again.scorer), values(scorer))


def sharded(found: dict[str, bool]) -> None:
    """FSDP version 2: base and scorer in shards, the prefixes through the root's forward."""
    ids = [torch.tensor([3, 9, 27, 21]), torch.tensor([5, 6, 7])]
    whole, cut = (attach(tiny_llama().requires_grad_(False), CPXConfig(rows=2)) for _ in range(2))
    expected = gradients(TrainModule(whole), in_memory(whole.prefilled, ids))
    module = TrainModule(cut)
    for layer in cut.base.model.layers:
        fully_shard(layer)
    fully_shard(module)
    found["parameters are sharded"] = hasattr(cut.rows, "full_tensor")
    stored = in_memory(lambda i, m: module(input_ids=i, attention_mask=m, keep=True), ids)
    ours = gradients(module, stored)
    found["sharded gradients are the same"] = all(
        torch.allclose(ours[name], expected[name], atol=1e-6) for name in expected
    )


def gradients(module: TrainModule, stored: Any) -> dict[str, torch.Tensor]:
    torch.nn.init.ones_(module.scorer.head.weight)
    logits = module(prefixes=stored.batch([1, 0]).as_dict())["logits"]
    logits.sum().backward()
    named = module.scorer.named_parameters()
    return {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in named}


if __name__ == "__main__":
    results: dict[str, bool] = {}
    data_parallel(results)
    sharded(results)
    (OUT / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()  # whoever leaves first cuts the others off in what they are still reading
    dist.destroy_process_group()
    os._exit(0)  # all is done and written: a thread of torch's that still runs would abort us
