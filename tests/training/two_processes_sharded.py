"""Run by `torch.distributed.run` as two processes on gloo: accelerate's own FSDP2 under Trainers.

accelerate shards on GPUs alone, by one condition on the kind of process. That is lifted here, and
all that it does then is its own: what it makes of a model and an optimizer, clipping, gathering,
and its checkpoints. Each process writes what it found to a file.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from tests.complexity.training.test_trainer import losses, rows, same, scorer_on, trainer, values
from tests.gradients.test_training import padded
from tests.gradients.test_training import rows as lessons
from tests.gradients.test_training import trainer as selective_trainer
from tests.minimal_adapter import tiny_llama
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from transformers import TrainerCallback

from pliant.complexity import Complexity, CPXTrainer
from pliant.errors import InvalidInput
from pliant.gradients import GradientConfig, attach
from pliant.gradients.training import SelectiveTraining

OUT = Path(sys.argv[1])
PROMPTS = [row["input_ids"] for row in rows(9, 7)]


@contextmanager
def gate_lifted() -> Iterator[None]:
    """Two processes on CPUs count as two that can be sharded over."""
    init = AcceleratorState.__init__

    def lifted(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = lifted  # type: ignore[method-assign]
    try:
        yield
    finally:
        AcceleratorState.__init__ = init  # type: ignore[method-assign]
        for name in [name for name in os.environ if "FSDP" in name]:
            del os.environ[name]  # accelerate's, for all that comes after in this process


class Watch(TrainerCallback):
    """Looks at the model between two steps."""

    def __init__(self) -> None:
        self.sharded: set[bool] = set()
        self.layers: set[bool] = set()

    def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        parts = [p.to_local().numel() if is_shard(p) else p.numel() for p in model.parameters()]
        mine = torch.tensor(sum(parts))
        dist.all_reduce(mine)
        self.sharded.add(int(mine) == sum(p.numel() for p in model.parameters()))
        self.sharded.add(all(map(is_shard, model.parameters())))
        kinds = [m for m in model.modules() if type(m).__name__.endswith("LlamaDecoderLayer")]
        self.layers.add(len(kinds) == 2 and all(hasattr(m, "unshard") for m in kinds))


def is_shard(p: Tensor) -> bool:
    return hasattr(p, "full_tensor")


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.full_tensor() if is_shard(v) else v for k, v in tensors.items()}


def close(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 1e-5) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=atol) for k in a)


# --- a scorer -------------------------------------------------------------------------------------

LORA = {"lora_rank": 2, "layer": 1, "rows": 2, "aggregation": "attention"}
HOW: dict[str, dict[str, Any]] = {
    "memory": {"prefixes": "memory"},
    "disk": {
        "prefixes": "disk",
        "fsdp_config": {"cpu_ram_efficient_loading": True},
        "rows_learning_rate": None,  # goes with the size of the rows: those of the first process
    },
    "lora": {
        "prefixes": "recompute",
        "scorer": LORA,
        "dtype": torch.bfloat16,
        "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"},
    },
    "base": {"prefixes": "recompute", "train_base": True},
}


def scorer_run(how: dict[str, Any], folder: Path, *, sharded: bool) -> tuple[CPXTrainer, Watch]:
    """A trainer that clips, evaluates, saves, and takes the best checkpoint at last."""
    how, watch = dict(how), Watch()
    config = how.pop("fsdp_config", {})
    fsdp = {"fsdp": True, "fsdp_config": dict(config)} if sharded else {}
    args = {"ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 3, **fsdp}
    args |= {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    # All but the first process have loaded nothing that is of use.
    seed = dist.get_rank() if sharded and "cpu_ram_efficient_loading" in config else 0
    base = tiny_llama(seed).to(how.pop("dtype", torch.float32))
    scorer = scorer_on(base, **how.pop("scorer", {}))
    run = trainer(scorer, folder, args=args, held=rows(9, 6), max_grad_norm=0.1, **how)
    run.add_callback(watch)
    return run, watch


def scorers(found: dict[str, bool]) -> None:
    for name, how in HOW.items():
        folder, facts = OUT / name, {}
        ddp, _ = scorer_run(how, folder / "whole", sharded=False)
        ddp.train()
        with gate_lifted():
            run, watch = scorer_run(how, folder / "sharded", sharded=True)
            run.train()
            facts["shards, between steps"] = watch.sharded == {True}
            facts["each layer by itself"] = watch.layers == {True}
            facts |= same_run(run, ddp)
            run.save_model(str(folder / "final"))
            again, _ = scorer_run(how, folder / "sharded", sharded=True)
            again.train(resume_from_checkpoint=str(folder / "sharded" / "checkpoint-3"))
        facts["resumed"] = same(whole(values(again.scorer)), whole(values(run.scorer)))
        facts["resumed losses"] = losses(again) == losses(run)
        trains_base = ddp.module.trains_base
        facts["a checkpoint"] = holds_base(folder / "sharded" / "checkpoint-3") == trains_base
        if not trains_base:
            dist.barrier()
            alone = Complexity.from_pretrained(unwrapped_base(how), folder / "final")
            both = [torch.tensor(one.score(PROMPTS).logits) for one in (alone, ddp.scorer)]
            facts["alone"] = torch.allclose(*both, atol=1e-5)
        found.update({f"{name}: {fact}": is_so for fact, is_so in facts.items()})


def same_run(run: CPXTrainer, ddp: CPXTrainer) -> dict[str, bool]:
    """What the sharded run learned and says, beside the one that holds all in each process."""
    learned = [torch.tensor(losses(one)) for one in (run, ddp)]
    evaluated = [torch.tensor(one.evaluate()["eval_loss"]) for one in (run, ddp)]
    predicted = [torch.tensor(one.predict(rows(9, 7)).predictions) for one in (run, ddp)]
    ours, theirs = (
        whole({name: p.detach() for name, p in one.scorer.base_parameters()}) for one in (run, ddp)
    )
    kept = close(ours, theirs) if ddp.module.trains_base else same(ours, theirs)
    return {
        "the losses": torch.allclose(*learned, atol=1e-5) and len(set(losses(run))) > 3,
        "evaluated": torch.allclose(*evaluated, atol=1e-5),
        "predicted": torch.allclose(*predicted, atol=1e-4),
        "the scorer": close(whole(values(run.scorer)), whole(values(ddp.scorer))),
        "the base": kept,
    }


def holds_base(checkpoint: Path) -> bool:
    """Whether what accelerate wrote of the model has its embeddings, in one file or in shards."""
    dist.barrier()
    if (checkpoint / "pytorch_model_fsdp.bin").is_file():
        names = list(torch.load(checkpoint / "pytorch_model_fsdp.bin"))
    else:
        shards = FileSystemReader(checkpoint / "pytorch_model_fsdp_0")
        names = list(shards.read_metadata().state_dict_metadata)
    assert any("pliant.complexity.rows" in name for name in names), names
    return any("embed_tokens" in name for name in names)


def unwrapped_base(how: dict[str, Any]) -> nn.Module:
    return tiny_llama().to(how.get("dtype", torch.float32))


def refused(found: dict[str, bool]) -> None:
    """By what accelerate made of these processes, and by nothing else."""
    asked: Any = {"ddp_backend": "gloo", "fsdp": True}
    try:
        trainer(scorer_on(), OUT / "refused", args=asked)
    except InvalidInput as error:
        found["not sharded, it is refused"] = "it runs as MULTI_CPU on cpu" in str(error)
    with gate_lifted():
        made = trainer(scorer_on(), OUT / "refused", args=asked)
        found["sharded, it is not"] = made.args.device.type == "cpu" and made.is_fsdp_enabled
    with gate_lifted():
        asked["fsdp_config"] = {"version": 1, "sync_module_states": False}
        try:
            trainer(scorer_on(), OUT / "refused", args=asked)
        except InvalidInput as error:
            found["the first version is refused"] = "--fsdp_version 2" in str(error)


# --- some tokens ----------------------------------------------------------------------------------

SOME = {
    "every token": GradientConfig(engine="exact", selection="all"),
    "exact": GradientConfig(engine="exact", selection="topk", ratio=0.4),
    "sparse": GradientConfig(engine="sparse", selection="topk", ratio=0.4),
}
LESSONS, RATE = lessons(24), 1e-2


def alone(config: GradientConfig, tied: bool) -> dict[str, Tensor]:
    """What one process learns from batches twice as large, in a plain loop."""
    model = tiny_llama(tie_word_embeddings=tied).train()
    attach(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(6):
        model(**padded(LESSONS[4 * step : 4 * step + 4])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def selective_run(config: GradientConfig, tied: bool, folder: Path, **more: Any) -> Any:
    model, watch = tiny_llama(tie_word_embeddings=tied), Watch()
    attach(model, config)
    fsdp = {"ddp_backend": "gloo", "fsdp": True, "save_strategy": "steps", "save_steps": 2}
    run = selective_trainer(
        model,
        folder,
        data=LESSONS,
        max_steps=6,
        optim="adamw_torch",
        learning_rate=RATE,
        callbacks=[watch, SelectiveTraining(config)],
        **fsdp,
        **more,
    )
    return run, watch


def some_tokens(found: dict[str, bool]) -> None:
    for tied in (False, True):
        for name, config in SOME.items():
            folder = OUT / f"{name} {tied}"
            with gate_lifted():
                run, watch = selective_run(config, tied, folder)
                run.train()
                trained = whole({k: p.detach() for k, p in run.model.named_parameters()})
                again, _ = selective_run(config, tied, folder)
                again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
            resumed = whole({k: p.detach() for k, p in again.model.named_parameters()})
            case = f"{name}, {'tied' if tied else 'free'} head"
            found[f"{case}: as one process"] = close(trained, alone(config, tied))
            found[f"{case}: shards, between steps"] = watch.sharded == watch.layers == {True}
            found[f"{case}: resumed"] = same(resumed, trained)


if __name__ == "__main__":
    results: dict[str, bool] = {}
    refused(results)
    scorers(results)
    some_tokens(results)
    (OUT / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()  # whoever leaves first cuts the others off in what they are still reading
    dist.destroy_process_group()
    os._exit(0)  # all is done and written: a thread of torch's that still runs would abort us
