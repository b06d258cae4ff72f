"""A training that was interrupted ends where an uninterrupted one does, to the last bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.minimal_adapter import (
    Scale,
    ScaleConfig,
    Warmup,
    WarmupConfig,
    logits,
    tiny_llama,
)
from tests.processes import run_two
from torch import nn
from transformers import Trainer, TrainingArguments

from pliant.adapters import attach, attached
from pliant.errors import AdapterError, CorruptFile
from pliant.training import AdapterCheckpoint, restore_adapters, save_adapters
from pliant.training.checkpoint import (
    checkpoints,
    is_complete,
    last_complete,
    mark_complete,
    remove_incomplete,
)

ROWS = [
    {"input_ids": ids, "labels": ids}
    for ids in torch.randint(0, 60, (24, 6), generator=torch.Generator().manual_seed(5)).tolist()
]


def model_with_adapters(train_base: bool = False) -> nn.Module:
    """Dropout is on, so that resuming has random numbers to get right as well."""
    model = tiny_llama(attention_dropout=0.1).requires_grad_(train_base)
    attach(model, Scale(model, ScaleConfig()))
    attach(model, Warmup(model, WarmupConfig(steps=9)))
    return model


def trainer(model: nn.Module, folder: Path, *callbacks: Any, **changes: Any) -> Trainer:
    options: dict[str, Any] = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "save_strategy": "steps",
        "save_steps": 4,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = TrainingArguments(output_dir=str(folder), **{**options, **changes})
    callbacks = callbacks or (AdapterCheckpoint(),)
    return Trainer(
        model, args, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=list(callbacks)
    )


def everything(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = dict(model.state_dict())
    for name, adapter in attached(model).items():
        state |= {f"{name}.{k}": v for k, v in adapter.state_dict().items()}
    return state


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("train_base", [False, True], ids=["frozen-base", "trained-base"])
def test_resumed_equals_uninterrupted(tmp_path: Path, train_base: bool) -> None:
    start = everything(model_with_adapters(train_base))
    whole = trainer(model_with_adapters(train_base), tmp_path / "whole")
    whole.train()
    cut = trainer(model_with_adapters(train_base), tmp_path / "cut")
    cut.train()
    for path in (tmp_path / "cut").glob("checkpoint-*"):  # as if killed after step 4
        if path.name != "checkpoint-4":
            shutil.rmtree(path)
    resumed = trainer(model_with_adapters(train_base), tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert same(everything(resumed.model), everything(whole.model))
    assert losses(resumed) == losses(whole)
    assert len(losses(whole)) == 12 and not same(everything(whole.model), start)
    assert attached(resumed.model)["warmup"].done == 12


def test_only_the_adapter_trains_on_a_frozen_base(tmp_path: Path) -> None:
    model = model_with_adapters()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    run = trainer(model, tmp_path)
    run.train()
    assert same(dict(model.state_dict()), base)
    optimised = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimised} == {id(p) for p in attached(model)["minimal"].parameters()}


def test_a_checkpoint_is_a_stock_model_with_the_adapters_beside_it(tmp_path: Path) -> None:
    run = trainer(model_with_adapters(train_base=True), tmp_path)
    run.train()
    model = tiny_llama(attention_dropout=0.1)
    again, report = type(model).from_pretrained(
        tmp_path / "checkpoint-12", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    Scale.from_pretrained(again, tmp_path / "checkpoint-12" / "adapters" / "minimal")
    assert torch.equal(logits(again), logits(run.model.eval()))


def test_the_best_checkpoints_adapters_come_back_with_its_base(tmp_path: Path) -> None:
    model = model_with_adapters()
    worst_is_best = {"metric_for_best_model": "loss", "greater_is_better": True}
    best = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    run = trainer(model, tmp_path, **best, **worst_is_best)
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-4")
    fresh = model_with_adapters()
    folder = tmp_path / "checkpoint-4" / "adapters" / "minimal"
    attached(fresh)["minimal"].restore(folder)
    assert torch.equal(attached(model)["minimal"].embeddings, attached(fresh)["minimal"].embeddings)


def test_mixed_precision_and_gradient_checkpointing_resume_too(tmp_path: Path) -> None:
    changes = {"bf16": True, "gradient_checkpointing": True}
    whole = trainer(model_with_adapters(), tmp_path / "whole", **changes)
    whole.train()
    again = AdapterCheckpoint(resume_from=tmp_path / "whole" / "checkpoint-4")
    resumed = trainer(model_with_adapters(), tmp_path / "elsewhere", again, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert same(everything(resumed.model), everything(whole.model))
    assert losses(resumed) == losses(whole)


def test_a_patched_forward_survives_accelerates_wrapping_and_unwrapping() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    model = model_with_adapters().train()
    warmup = attached(model)["warmup"]
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    wrapped = accelerator.prepare(model)
    row = {key: torch.tensor([ROWS[0][key]]) for key in ROWS[0]}
    wrapped(**row)
    assert warmup.done == 1
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)(**row)
    assert warmup.done == 2
    warmup.detach()
    assert model(**row).loss is not None and warmup.done == 2
    AcceleratorState._reset_state(reset_partial_state=True)


def test_resuming_without_what_was_attached_says_so(tmp_path: Path) -> None:
    trainer(model_with_adapters(), tmp_path).train()
    model = tiny_llama(attention_dropout=0.1).requires_grad_(False)
    attach(model, Scale(model, ScaleConfig()))
    with pytest.raises(AdapterError, match="saved with minimal, warmup attached, and now minimal"):
        trainer(model, tmp_path).train(resume_from_checkpoint=True)


def test_a_search_over_settings_is_refused_where_something_is_attached(tmp_path: Path) -> None:
    run = trainer(model_with_adapters(), tmp_path)
    run.state.is_hyper_param_search = True
    with pytest.raises(AdapterError, match="trains every trial on the adapters of the one before"):
        run.callback_handler.on_save(run.args, run.state, run.control)
    assert not list(tmp_path.rglob("adapters"))


def test_one_damaged_adapter_leaves_all_as_they_were(tmp_path: Path) -> None:
    model = model_with_adapters()
    save_adapters(model, tmp_path)
    with torch.no_grad():
        attached(model)["minimal"].embeddings.fill_(2.0)
    attached(model)["warmup"].done = 5
    before = {k: v.clone() if torch.is_tensor(v) else v for k, v in everything(model).items()}
    for name in attached(model):
        index = tmp_path / "adapters" / name / "pliant.json"
        content = index.read_bytes()
        index.write_bytes(content[:-9])
        with pytest.raises(CorruptFile, match=name):
            restore_adapters(model, tmp_path)
        index.write_bytes(content)
        assert same(everything(model), before)
    restore_adapters(model, tmp_path)
    assert attached(model)["warmup"].done == 0


def test_a_checkpoint_elsewhere_is_not_mistaken_for_the_one_here(tmp_path: Path) -> None:
    trainer(model_with_adapters(), tmp_path / "a").train()
    trainer(model_with_adapters(), tmp_path / "b", learning_rate=0.01).train()
    other = str(tmp_path / "b" / "checkpoint-8")
    with pytest.raises(AdapterError, match=r"AdapterCheckpoint\(resume_from=...\)"):
        trainer(model_with_adapters(), tmp_path / "a").train(resume_from_checkpoint=other)


def test_two_processes_train_one_adapter_and_write_it_once(tmp_path: Path, root: Path) -> None:
    run_two("tests.training.two_processes", str(tmp_path), cwd=root)
    first, second = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2))
    assert first.pop("writes") == 2 * 2 + 2 * 1 + 1 and second.pop("writes") == 0
    assert first == second
    assert all(first.values()), first


def test_a_model_with_nothing_attached_trains_as_ever(tmp_path: Path) -> None:
    trainer(tiny_llama(), tmp_path).train()
    assert not (tmp_path / "checkpoint-4" / "adapters").exists()
    trainer(tiny_llama(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


# --- completeness --------------------------------------------------------------------------------

FILES = ("model.safetensors", "optimizer.pt", "trainer_state.json", "adapters/x/pliant.json")


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    for name in FILES:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(f"{name} at {step}")
    return path


def test_the_last_complete_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    for step in (90, 100, 20):
        mark_complete(checkpoint(tmp_path, step))
    checkpoint(tmp_path, 110)  # killed before its mark
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete(tmp_path) == tmp_path / "checkpoint-100"
    assert [path.name for path in checkpoints(tmp_path)][-1] == "checkpoint-110"
    assert remove_incomplete(tmp_path) == ["checkpoint-110"]
    assert not (tmp_path / "checkpoint-110").exists() and (tmp_path / "checkpoint-20").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_without_a_file_or_its_end_is_incomplete(tmp_path: Path, name: str) -> None:
    path = checkpoint(tmp_path, 3)
    mark_complete(path)
    assert is_complete(path)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1])
    assert not is_complete(path) and last_complete(tmp_path) is None
    (path / name).write_bytes(content)
    assert is_complete(path)
    (path / name).unlink()  # as when it is being removed to make room
    assert not is_complete(path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}'])
def test_a_damaged_marker_marks_nothing(tmp_path: Path, content: str) -> None:
    path = checkpoint(tmp_path, 3)
    mark_complete(path)
    (path / "complete.json").write_text(content)
    assert not is_complete(path)


def test_a_folder_without_checkpoints_has_no_last_one(tmp_path: Path) -> None:
    assert last_complete(tmp_path) is None and remove_incomplete(tmp_path / "nowhere") == []
