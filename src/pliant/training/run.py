"""A training run in a folder of its own: started, interrupted, killed, resumed and finished.

    run = TrainingRun(args, plan, resume=True)
    trainer = run.train(lambda: Trainer(model, args, ...), prepare=make_selective)
    save_stock_model(trainer.model, tokenizer, run.folder)
    print(run.result(trainer))

The folder holds `pliant-train.json` (what the run is, so that it resumes as what it was), the
checkpoints, and in the end the model.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)

from pliant import __version__
from pliant.errors import CorruptFile, InvalidInput, PliantError
from pliant.files import write_file
from pliant.training.arguments import one_line, refuse_tokens
from pliant.training.checkpoint import (
    GO_ON,
    CompleteCheckpoint,
    FiniteCheckpoint,
    last_complete,
    read_state,
    remove_incomplete,
    restore_adapters,
)
from pliant.training.distributed import from_first_process
from pliant.training.folder import (
    RECORD,
    check_folder,
    has_begun,
    how_it_resumes,
    lock,
    refuse_another_plan,
)
from pliant.training.result import TrainingResult, ends_of
from pliant.training.terminal import (
    Describe,
    ProgressReport,
    Say,
    finish_step_on_interrupt,
    print_to_stderr,
)

T = TypeVar("T", bound=Trainer)
UNFINISHED = ".model.unfinished"
LORA = "lora"
CONFLICTS = (ValueError, ImportError, RuntimeError)
"""What transformers raises for settings that exclude each other."""


class TrainingRun:
    """One training in the `output_dir` of its arguments.

    `plan` is everything that the losses depend on, apart from the machine, as JSON can hold it: a
    run is resumed with the plan it was started with, or refused. With `shared`, the folder may hold
    other files, and a finished run without checkpoints is replaced.
    """

    def __init__(
        self,
        args: TrainingArguments,
        plan: Mapping[str, Any],
        *,
        resume: bool = False,
        shared: bool = False,
        say: Say = print_to_stderr,
    ) -> None:
        refuse_tokens(args)
        self.args, self.say = args, say
        self.folder = Path(str(args.output_dir))
        self.record: dict[str, Any] = {"pliant": __version__, "plan": json.loads(json.dumps(plan))}
        self.seconds = 0.0
        self._release: Callable[[], object] = lambda: None  # of the lock that one process holds
        self.checkpoint = self._in_first_process(lambda: self._open(resume, shared))

    @property
    def resumed_at(self) -> int:
        return int(self.checkpoint.name.rpartition("-")[2]) if self.checkpoint else 0

    def train(
        self,
        build: Callable[[], T],
        prepare: Callable[[T], Any] = lambda trainer: None,
        describe: Describe = lambda logs: "",
    ) -> T:
        """Build the trainer and train to the end; returns the trainer.

        Settings that `build` or `prepare` refuse leave the folder free for another try.
        """
        with self._unstarted():
            trainer = build()
            prepare(trainer)
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        began = time.perf_counter()
        try:
            with ProgressReport(self.say, describe) as progress:
                trainer.add_callback(progress)
                trainer.add_callback(FiniteCheckpoint())  # behind those that load
                CompleteCheckpoint.last_of(trainer)
                if not self._has_ended(trainer):
                    checkpoint = str(self.checkpoint) if self.checkpoint else None
                    with finish_step_on_interrupt(trainer), self._readable():
                        trainer.train(resume_from_checkpoint=checkpoint)
        except BaseException:
            self._release()
            raise
        self.seconds = time.perf_counter() - began
        return trainer

    def result(self, trainer: Trainer, eval_loss: float | None = None) -> TrainingResult:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return TrainingResult(
            steps=trainer.state.global_step,
            first_loss=losses[0] if losses else float("nan"),
            last_loss=losses[-1] if losses else float("nan"),
            losses=ends_of(trainer.state.log_history, "loss"),
            eval_loss=eval_loss,
            seconds=self.seconds,
            resumed_at=self.resumed_at,
        )

    def note(self, **facts: Any) -> None:
        """Add to the record, which every process keeps and the first one writes."""
        self.record.update(facts)
        if self.args.process_index == 0:
            content = (json.dumps(self.record, indent=2) + "\n").encode()
            write_file(self.folder / RECORD, content)
        if "ended" in facts:
            self._release()

    def _in_first_process(self, open_folder: Callable[[], Path | None]) -> Path | None:
        """One process decides; the others would meet what it has just written."""
        checkpoint, error = None, None
        if self.args.process_index == 0:
            try:
                checkpoint = open_folder()
            except (PliantError, OSError) as caught:
                error = caught
        if self.args.world_size > 1:
            checkpoint, self.record, error = from_first_process(checkpoint, self.record, error)
        if error is not None:
            raise error
        return checkpoint

    def _open(self, resume: bool, shared: bool) -> Path | None:
        """The checkpoint to resume from, if there is one; the folder is this run's from now on."""
        record = check_folder(self.folder, resume, shared=shared)
        begun = has_begun(self.folder, shared=shared) or "ended" in (record or {})
        if record is not None and resume and begun:
            refuse_another_plan(self.folder, record["plan"], self.record["plan"])
            self.record = {**record, "plan": self.record["plan"]}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._release = weakref.finalize(self, lock(self.folder))
        if record is not None and resume and begun:
            for name in remove_incomplete(self.folder):
                self.say(f"{name} was not finished when the run ended: it is left out")
        self.note()
        checkpoint = last_complete(self.folder) if resume else None
        if resume:
            self.say(how_it_resumes(self.folder, record, checkpoint))
        return checkpoint

    @contextmanager
    def _unstarted(self) -> Iterator[None]:
        """An error in here is the settings' fault: with others, the folder may be used again."""
        try:
            yield
        except Exception as error:
            self._release()
            if self.checkpoint is None and self.args.process_index == 0:
                (self.folder / RECORD).unlink(missing_ok=True)
            if isinstance(error, PliantError) or not isinstance(error, CONFLICTS):
                raise
            raise InvalidInput(f"the settings do not go together: {one_line(error)}") from error

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Name a checkpoint with weights or a state that is damaged, or would run code."""
        try:
            yield
        except (pickle.UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
            signs = ("PytorchStreamReader", "weights_only", "loading state_dict")
            others = isinstance(error, RuntimeError) and not any(s in str(error) for s in signs)
            if others or self.checkpoint is None:
                raise
            raise CorruptFile(
                f"{self.checkpoint}: its state cannot be read ({one_line(error)[:160]}): it has "
                f"been changed or damaged, or the model is another one now. {GO_ON}"
            ) from error

    def _has_ended(self, trainer: Trainer) -> bool:
        """Whether only saving is left to do (the Trainer would train for one step more)."""
        if self.checkpoint is None:
            return False
        state = read_state(self.checkpoint)
        if state.global_step < state.max_steps:
            return False
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        source = Path(best or self.checkpoint)
        trainer._load_from_checkpoint(str(source))
        restore_adapters(trainer.model, source)
        trainer.state = state
        return True


# --- the model -----------------------------------------------------------------------------------


def with_lora(model: Any, rank: int, seed: int) -> Any:
    """Low-rank matrices on every linear layer but the head; they alone are trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(seed)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, settings)


def save_stock_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model beside its place, then move it there file by file. LoRA matrices are merged,
    and saved by themselves as well."""
    unfinished = folder / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(folder / LORA)
        model = model.merge_and_unload()
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    for path in unfinished.iterdir():
        os.replace(path, folder / path.name)
    unfinished.rmdir()
