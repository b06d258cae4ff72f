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
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from pliant import __version__
from pliant.errors import InvalidInput, PliantError
from pliant.files import check_writable, leftovers, write_file
from pliant.training.arguments import one_line, refuse_tokens
from pliant.training.checkpoint import (
    TRAINER_STATE,
    CompleteCheckpoint,
    checkpoints,
    last_complete,
    remove_incomplete,
    restore_adapters,
)
from pliant.training.distributed import from_first_process
from pliant.training.terminal import (
    Describe,
    ProgressReport,
    Say,
    finish_step_on_interrupt,
    print_to_stderr,
)

T = TypeVar("T", bound=Trainer)
RECORD = "pliant-train.json"
UNFINISHED = ".model.unfinished"
LOCK = ".pliant-train.lock"
UNBEGUN = {RECORD, LOCK, "runs", "log.jsonl"}
"""What is in a run's folder before its first checkpoint: its record, and logs."""
LORA = "lora"
OF_THE_MACHINE = {"use_cpu", "report_to", "run_name", "project"}
"""Settings that change no loss beyond rounding: a resumed run may change them."""
FEWEST_STEPS = 10
"""Single steps differ too much: where a run began and ended is a mean over at least so many."""
CONFLICTS = (ValueError, ImportError, RuntimeError)
"""What transformers raises for settings that exclude each other."""


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to; the seconds are those since it was resumed."""

    steps: int
    first_loss: float
    """As logged first, a mean over `logging_steps`; and last."""
    last_loss: float
    losses: tuple[float, float] | None
    """The means over the first and over the last steps, at least `FEWEST_STEPS` each; None if there
    were too few to tell whether the loss fell."""
    eval_loss: float | None
    seconds: float
    resumed_at: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.losses is None:
            return f"{self.steps} {self.steps_word}: too few to tell whether the loss fell"
        first, last = self.losses
        return f"{self.steps} steps took the loss from {first:.4f} to {last:.4f}"

    @property
    def steps_word(self) -> str:
        return "step" if self.steps == 1 else "steps"

    def cells(self) -> list[list[str]]:
        """The rows of the final table: what, and how much."""
        resumed = f" (from {self.resumed_at} on)" if self.resumed_at else ""
        evaluated = [] if self.eval_loss is None else [f"{self.eval_loss:.4f}"]
        return [
            ["steps", f"{self.steps}{resumed}"],
            *self.loss_cells(),
            *(["loss on evaluation data", loss] for loss in evaluated),
            ["seconds", f"{self.seconds:.1f}"],
        ]

    def loss_cells(self) -> list[list[str]]:
        """Where the loss began and ended, if there were enough steps to tell."""
        if self.losses is None:
            missing = f"{self.steps} {self.steps_word}: too few to tell whether it fell"
            return [["loss", f"{self.last_loss:.4f}; {missing}"]]
        first, last = self.losses
        return [["loss of the first steps", f"{first:.4f}"], ["of the last", f"{last:.4f}"]]


def ends_of(
    history: Sequence[Mapping[str, Any]], key: str, fewest: int = FEWEST_STEPS
) -> tuple[float, float] | None:
    """The means of what was logged over the first and over the last steps, `fewest` or more each;
    None if these would overlap.

    What is logged is the mean since the log before it.
    """
    logs = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
    starts = [0, *(step for step, _ in logs)]
    spans = [(step - start, value) for start, (step, value) in zip(starts, logs, strict=False)]
    first, last = _span_mean(spans, fewest), _span_mean(spans[::-1], fewest)
    if first is None or last is None or first[0] + last[0] > len(spans):
        return None
    return first[1], last[1]


def _span_mean(spans: Sequence[tuple[int, float]], fewest: int) -> tuple[int, float] | None:
    """How many of the first spans cover so many steps, and the mean over them."""
    covered, total = 0, 0.0
    for count, (steps, value) in enumerate(spans, start=1):
        covered, total = covered + steps, total + steps * value
        if covered >= fewest:
            return count, total / covered
    return None


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
                CompleteCheckpoint.last_of(trainer)
                if not self._has_ended(trainer):
                    checkpoint = str(self.checkpoint) if self.checkpoint else None
                    with finish_step_on_interrupt(trainer):
                        trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            self._release()
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
            _refuse_another_plan(self.folder, record["plan"], self.record["plan"])
            self.record = {**record, "plan": self.record["plan"]}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._release = weakref.finalize(self, _locked(self.folder))
        if record is not None and resume and begun:
            for name in remove_incomplete(self.folder):
                self.say(f"{name} was not finished when the run ended: it is left out")
        self.note()
        checkpoint = last_complete(self.folder) if resume else None
        if resume:
            self.say(_how_it_resumes(self.folder, record, checkpoint))
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

    def _has_ended(self, trainer: Trainer) -> bool:
        """Whether only saving is left to do (the Trainer would train for one step more)."""
        if self.checkpoint is None:
            return False
        state = TrainerState.load_from_json(str(self.checkpoint / TRAINER_STATE))
        if state.global_step < state.max_steps:
            return False
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        source = Path(best or self.checkpoint)
        trainer._load_from_checkpoint(str(source))
        restore_adapters(trainer.model, source)
        trainer.state = state
        return True


def _locked(folder: Path) -> Callable[[], None]:
    """Lock a folder, unless another training is at work in it: the two would mix their checkpoints.
    Returns what unlocks it; the end of the process does, too."""
    try:
        import fcntl
    except ImportError:  # Windows
        return lambda: None
    path = folder / LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InvalidInput(
            f"{folder}: another training is at work in it: wait for its end, or give another folder"
        ) from None
    except OSError:  # a file system without locks
        pass

    def release() -> None:
        path.unlink(missing_ok=True)
        os.close(handle)

    return release


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `pliant-train.json` holds, if there is one."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        assert isinstance(content["plan"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise InvalidInput(f"{path}: damaged; give another folder") from error
    return dict(content)


def check_folder(folder: Path, resume: bool, *, shared: bool = False) -> dict[str, Any] | None:
    """Refuse a folder that no run may begin or resume in; returns the record of its run."""
    check_writable(folder)
    record = read_record(folder)
    if record is None and not shared:
        _refuse_other_files(folder)
    if not resume and has_begun(folder, shared=shared) and (record is not None or shared):
        raise InvalidInput(f"{folder}: holds a run already: add --resume, or give another folder")
    return record


def has_begun(folder: Path, *, shared: bool = False) -> bool:
    """Whether a run in this folder got so far that something would be lost. Killed before its first
    checkpoint, or refused for its settings, it leaves its record and logs alone."""
    if shared or not folder.is_dir():
        return bool(checkpoints(folder))
    return any(path.name not in UNBEGUN for path in _contents(folder))


def _contents(folder: Path) -> set[Path]:
    """Without a record that a kill left unfinished."""
    return set(folder.iterdir()) - set(leftovers(folder / RECORD))


def _how_it_resumes(folder: Path, record: Any, checkpoint: Path | None) -> str:
    if checkpoint is not None:
        return f"resuming from {checkpoint.name}"
    if record is None:
        return f"{folder} holds no run yet: starting one"
    return "no checkpoint yet: starting again"


def _refuse_other_files(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InvalidInput(f"{folder} is a file: give a folder")
    if folder.is_dir() and _contents(folder):
        what = "checkpoints of another training" if checkpoints(folder) else "something else"
        raise InvalidInput(f"{folder}: is not empty (it holds {what}): give another folder")


def _refuse_another_plan(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, value in before.items():
        if now.get(key) == value or key == "data":
            continue
        if isinstance(value, dict) and isinstance(now.get(key), dict):
            names = {k for k in value.keys() | now[key].keys() if value.get(k) != now[key].get(k)}
            if key == "settings" and names <= OF_THE_MACHINE:
                continue
            key = f"{key} ({', '.join(sorted(names))})"
        what = "other data" if key == "content" else f"another {key}"
        raise InvalidInput(
            f"{folder}: this run was begun with {what}: resume it as it was begun, or give "
            "another folder"
        )


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
