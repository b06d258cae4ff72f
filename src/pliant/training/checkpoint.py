"""One layout for every checkpoint, and which of them are complete.

    checkpoint-20/
      ...                what the Trainer writes: the base, the optimizer, its own state
      adapters/<name>/   each attached adapter, as its `save_pretrained` writes it
      complete.json      written last: the files of this checkpoint and their sizes

A kill may leave a checkpoint with some of its files. Without its marker, or with a file missing or
of another size, it is incomplete, and no run resumes from it.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pliant.adapters import Adapter, attached, files, saving
from pliant.errors import AdapterError, CorruptFile, InvalidInput
from pliant.files import write_file

FOLDER = "adapters"
MARKER = "complete.json"
TRAINER_STATE = "trainer_state.json"
NAME = re.compile(r"checkpoint-(\d+)")


# --- adapters ------------------------------------------------------------------------------------


class AdapterCheckpoint(TrainerCallback):
    """Saves the attached adapters beside each checkpoint, and restores them with it.

    Before `trainer.train(resume_from_checkpoint=...)`, attach the same adapters as for the first
    run. The Trainer does not pass the checkpoint's folder to its callbacks: pass `resume_from` for
    one outside the `output_dir`.
    """

    def __init__(self, resume_from: str | Path | None = None) -> None:
        self.resume_from = resume_from

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        model = event["model"]
        if state.is_hyper_param_search and attached(model):
            raise AdapterError("a search trains every trial on the adapters of the one before it")
        save_adapters(model, _checkpoint(args, state), here=args.should_save)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        model = event["model"]
        if state.global_step == 0:
            return
        named = self.resume_from or args.resume_from_checkpoint
        folder = Path(named) if isinstance(named, (str, Path)) else _checkpoint(args, state)
        _refuse_another_run(folder, state)
        restore_adapters(model, folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """The Trainer has just restored the base of the best checkpoint; its adapters follow."""
        model = event["model"]
        if args.load_best_model_at_end and state.best_model_checkpoint:
            restore_adapters(model, Path(state.best_model_checkpoint))


def save_adapters(model: nn.Module, checkpoint: Path, *, here: bool = True) -> None:
    """Save every attached adapter; all processes call this, and one of them writes (`here`)."""
    for name, adapter in attached(model).items():
        saving.save(adapter, checkpoint / FOLDER / name, here=here)


def restore_adapters(model: nn.Module, checkpoint: Path) -> None:
    """Restore the adapters of a checkpoint; the same ones must be attached now."""
    adapters = attached(model)
    saved = _saved_adapters(checkpoint, adapters)
    if saved.keys() != adapters.keys():
        raise AdapterError(
            f"{checkpoint}: was saved with {_names(saved)} attached, and now {_names(adapters)}: "
            "attach the same before resuming, or resume from another checkpoint"
        )
    states = {
        name: saving.read_matching(adapter, saved[name]) for name, adapter in adapters.items()
    }
    for name, adapter in adapters.items():  # none changes before all states are checked
        saving.load_state(adapter, states[name])


def _saved_adapters(checkpoint: Path, adapters: dict[str, Adapter]) -> dict[str, Path]:
    folder = checkpoint / FOLDER
    if folder.is_dir():
        return {path.name: path for path in folder.iterdir()}
    if not _has_former_layout(checkpoint):
        return {}
    part = files.read(checkpoint).index.part
    names = [name for name, adapter in adapters.items() if adapter.part == part]
    return {names[0] if len(names) == 1 else part: checkpoint}


def _has_former_layout(checkpoint: Path) -> bool:
    """Pliant 0.1 saved a scorer directly in its checkpoint."""
    return (checkpoint / files.INDEX).is_file()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _refuse_another_run(folder: Path, state: TrainerState) -> None:
    """The Trainer read its state from the checkpoint that it resumes: `folder` must hold it."""
    record = folder / TRAINER_STATE
    if not record.is_file() or TrainerState.load_from_json(str(record)).log_history != (
        state.log_history
    ):
        raise AdapterError(
            f"{folder}: not the checkpoint that is being resumed at step {state.global_step}: "
            "name that one, AdapterCheckpoint(resume_from=...)"
        )


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


# --- what a resumed run may go on with ----------------------------------------------------------


class FiniteCheckpoint(TrainerCallback):
    """Refuses to go on from weights or optimizer state with NaN or infinity: no step mends them."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        if state.global_step == 0:
            return
        tensors = [(n, p) for n, p in event["model"].named_parameters() if p.requires_grad]
        for values in getattr(event.get("optimizer"), "state", {}).values():
            tensors += [
                (f"the optimizer's {k}", v) for k, v in values.items() if torch.is_tensor(v)
            ]
        for name, tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if type(local) not in (torch.Tensor, nn.Parameter):
                continue  # a quantised state implements what its optimizer needs, and no more
            if local.is_floating_point() and not local.is_meta and not local.isfinite().all():
                raise CorruptFile(f"{_checkpoint(args, state)}: {name} {NOT_FINITE}")


def read_state(checkpoint: Path) -> TrainerState:
    """The Trainer's state, whose numbers are numbers."""
    path = checkpoint / TRAINER_STATE
    try:
        state = TrainerState.load_from_json(str(path))
        for name in NUMBERS:
            value = getattr(state, name)
            if name == "best_metric" and isinstance(value, float):
                continue  # infinite until a metric is a number
            if not (value is None or type(value) in (int, float) and math.isfinite(value)):
                raise ValueError(f"{name} is {value!r}")
        for name in ("global_step", "max_steps"):
            if not isinstance(getattr(state, name), int):
                raise ValueError(f"{name} is {getattr(state, name)!r}")
        if not all(isinstance(entry, dict) for entry in state.log_history):
            raise ValueError("log_history holds no logs")
        callbacks = state.stateful_callbacks
        if not isinstance(callbacks, dict) or not isinstance(callbacks.get(CONTROL), dict):
            raise ValueError(f"stateful_callbacks has no {CONTROL}")
    except TypeError as error:
        raise CorruptFile(f"{path}: not what the Trainer writes (wrong types). {GO_ON}") from error
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        raise CorruptFile(f"{path}: not what the Trainer writes ({error}). {GO_ON}") from error
    return state


NUMBERS = (
    *("epoch", "global_step", "max_steps", "num_train_epochs", "total_flos"),
    *("logging_steps", "eval_steps", "save_steps", "train_batch_size", "best_metric"),
)
CONTROL = TrainerControl.__name__
GO_ON = "Remove this folder, and the run goes on from the one before"
NOT_FINITE = f"holds NaN or infinity: the training had diverged, or the file was edited. {GO_ON}"


# --- completeness --------------------------------------------------------------------------------


class CompleteCheckpoint(TrainerCallback):
    """Writes the marker of each checkpoint, after the files of every other callback."""

    @classmethod
    def last_of(cls, trainer: Trainer) -> None:
        """Put it behind all callbacks that `trainer` has now."""
        trainer.remove_callback(cls)
        trainer.add_callback(cls())

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.world_size > 1:
            dist.barrier()  # every process writes files of its own
        if args.should_save:
            mark_complete(_checkpoint(args, state))


def mark_complete(checkpoint: Path) -> None:
    """Record the files that are there now as all the files of this checkpoint."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    content = json.dumps({"files": _sizes(checkpoint)}, indent=1).encode()
    write_file(checkpoint / MARKER, content)


def is_complete(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint were written, and are still there."""
    if not (checkpoint / MARKER).is_file():
        return _has_former_layout(checkpoint) and _is_json(checkpoint / TRAINER_STATE)
    try:
        recorded = json.loads((checkpoint / MARKER).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    sizes = _sizes(checkpoint)
    return isinstance(recorded, dict) and all(sizes.get(k) == size for k, size in recorded.items())


def last_complete(folder: str | Path) -> Path | None:
    """The latest checkpoint of a run that can be resumed from."""
    return next((path for path in reversed(checkpoints(folder)) if is_complete(path)), None)


def resume_path(resume: Any, folder: str | Path) -> Any:
    """The folder that the Trainer's argument `resume_from_checkpoint` stands for: True is the last
    complete checkpoint."""
    if resume is not True:
        return resume
    if (checkpoint := last_complete(folder)) is None:
        raise InvalidInput(f"{folder}: holds no complete checkpoint to resume from")
    return str(checkpoint)


def remove_incomplete(folder: str | Path) -> list[str]:
    """Remove the incomplete checkpoints of a run; returns their names."""
    incomplete = [path for path in checkpoints(folder) if not is_complete(path)]
    for path in incomplete:
        shutil.rmtree(path)
    return [path.name for path in incomplete]


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, in the order of their steps."""
    matches = [(NAME.fullmatch(path.name), path) for path in Path(folder).glob("checkpoint-*")]
    return [path for _, path in sorted((int(m[1]), p) for m, p in matches if m and p.is_dir())]


def _sizes(checkpoint: Path) -> dict[str, int]:
    paths = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARKER)
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in paths}


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True
