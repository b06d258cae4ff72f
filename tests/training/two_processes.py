"""Run by `torch.distributed.run` as two processes on gloo; each writes what it found to a file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tests.minimal_adapter import Scale, ScaleConfig, logits, tiny_llama, trained
from tests.training.test_checkpoint import everything, losses, model_with_adapters, same, trainer
from torch.distributed.fsdp import fully_shard

from pliant.adapters import attach, attached, files, saving

OUT = Path(sys.argv[1])
WRITES: list[Path] = []
_write = files.write


def counted(folder: Path, *rest: object) -> None:
    WRITES.append(folder)
    _write(folder, *rest)  # type: ignore[arg-type]


def agree(tensor: torch.Tensor) -> bool:
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor.detach().contiguous())
    return torch.equal(*both)


def data_parallel(found: dict[str, bool]) -> None:
    options = {"max_steps": 4, "save_steps": 2, "ddp_backend": "gloo"}
    model = model_with_adapters()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    run = trainer(model, OUT / "whole", **options)
    run.train()
    scale = attached(model)["minimal"]
    found["it ran in parallel"] = run.args.world_size == 2
    found["the base did not move"] = same(dict(model.state_dict()), base)
    found["the adapter moved"] = not torch.equal(scale.embeddings, torch.ones(16))
    found["both have the same adapter"] = agree(scale.embeddings) and agree(scale.head)
    again = trainer(model_with_adapters(), OUT / "whole", **options)
    again.train(resume_from_checkpoint=str(OUT / "whole" / "checkpoint-2"))
    found["resumed equals uninterrupted"] = same(everything(again.model), everything(model))
    found["and so do its losses"] = losses(again) == losses(run)


def sharded(found: dict[str, bool]) -> None:
    model = tiny_llama()
    adapter = trained(attach(model, Scale(model, ScaleConfig())))
    whole = {k: v.clone() for k, v in adapter.state_dict().items()}
    said = logits(model)
    stock = list(model.state_dict())
    fully_shard(model.requires_grad_(False))
    found["parameters are sharded"] = hasattr(adapter.embeddings, "full_tensor")
    found["sharded, it says the same"] = torch.allclose(logits(model), said, atol=1e-6)
    found["sharded, it is hidden as well"] = list(model.state_dict()) == stock
    found["a frozen base is still known"] = adapter.fingerprint().level == "values"
    saving.save(adapter, OUT / "sharded", here=dist.get_rank() == 0)
    dist.barrier()
    alone = Scale.from_pretrained(tiny_llama(), OUT / "sharded")
    found["saved from shards, it is whole"] = same(dict(alone.state_dict()), whole)
    with torch.no_grad():
        adapter.embeddings.zero_()
    adapter.restore(OUT / "sharded")
    back = adapter.embeddings.full_tensor()
    found["restored into shards"] = torch.equal(back, whole["embeddings"])
    adapter.requires_grad_(True)
    model.model.norm.weight.requires_grad_(True)
    print(adapter.fingerprint().why)
    found["a trained base is not"] = adapter.fingerprint().why == "the base is sharded"


if __name__ == "__main__":
    files.write = counted
    results: dict[str, bool] = {}
    data_parallel(results)
    sharded(results)
    record = OUT / f"rank{dist.get_rank()}.json"
    record.write_text(json.dumps({**results, "writes": len(WRITES)}))
    dist.barrier()  # whoever leaves first cuts the others off in what they are still reading
    dist.destroy_process_group()
    os._exit(0)  # all is done and written: a thread of torch's that still runs would abort us
