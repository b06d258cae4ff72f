"""What every training shares: what is attached to a model is saved and resumed with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pliant.adapters import attached, saving
from pliant.errors import AdapterError

FOLDER = "adapters"  # checkpoint-20/adapters/<name>/


class AdapterCheckpoint(TrainerCallback):
    """Saves what is attached beside each checkpoint, and takes it up again with it.

    Attach what the checkpoint was made with, as for its first run, before
    `trainer.train(resume_from_checkpoint=...)`. The Trainer does not tell its callbacks which
    checkpoint that is: one outside of the `output_dir` is named here as well.
    """

    def __init__(self, resume_from: str | Path | None = None) -> None:
        self.resume_from = resume_from

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None
        if state.is_hyper_param_search and attached(model):
            raise AdapterError("a search trains every trial on the adapters of the one before it")
        save_adapters(model, _checkpoint(args, state), here=args.should_save)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None
        if state.global_step == 0:
            return
        named = self.resume_from or args.resume_from_checkpoint
        folder = Path(named) if isinstance(named, (str, Path)) else _checkpoint(args, state)
        _refuse_another_run(folder, state)
        restore_adapters(model, folder)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """The Trainer has just put the best checkpoint's base back: its adapters belong to it."""
        assert model is not None
        if args.load_best_model_at_end and state.best_model_checkpoint:
            restore_adapters(model, Path(state.best_model_checkpoint))


def save_adapters(model: nn.Module, checkpoint: Path, *, here: bool = True) -> None:
    """Save all that is attached to `model`; every process calls this, one of them with `here`."""
    for name, adapter in attached(model).items():
        saving.save(adapter, checkpoint / FOLDER / name, here=here)


def restore_adapters(model: nn.Module, checkpoint: Path) -> None:
    """Put back what was saved beside a checkpoint; it must be what is attached now."""
    adapters = attached(model)
    folder = checkpoint / FOLDER
    saved = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if saved != adapters.keys():
        raise AdapterError(
            f"{checkpoint}: was saved with {_names(saved)} attached, and now {_names(adapters)}: "
            "attach the same before resuming, or resume from another checkpoint"
        )
    fitting = {name: saving.fitting(adapter, folder / name) for name, adapter in adapters.items()}
    for name, adapter in adapters.items():  # no one is changed before all are found good
        saving.take(adapter, fitting[name])


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _refuse_another_run(folder: Path, state: TrainerState) -> None:
    """The state has been read from the checkpoint that is resumed, so this folder must hold it."""
    record = folder / "trainer_state.json"
    if not record.is_file() or TrainerState.load_from_json(str(record)).log_history != (
        state.log_history
    ):
        raise AdapterError(
            f"{folder}: not the checkpoint that is being resumed at step {state.global_step}: "
            "name that one, AdapterCheckpoint(resume_from=...)"
        )


def _names(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
