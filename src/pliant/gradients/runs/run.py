"""One training run in a folder: begun, killed, resumed, and ended as a stock model.

The folder holds `pliant-train.json` (what the run is, so that it is resumed as what it was), the
checkpoints, and in the end the model itself, which plain transformers loads.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pliant import __version__
from pliant.adapters.files import write_file
from pliant.errors import InvalidInput, PliantError
from pliant.gradients.config import GradientConfig
from pliant.gradients.model import Gradients
from pliant.gradients.runs.settings import arguments
from pliant.gradients.runs.texts import Padded, Texts, numbered
from pliant.gradients.training import PREFIX, make_selective
from pliant.training.checkpoint import (
    CompleteCheckpoint,
    checkpoints,
    last_complete,
    remove_incomplete,
)
from pliant.training.interrupt import finish_step_on_interrupt

RECORD = "pliant-train.json"
UNFINISHED = ".model.unfinished"
ADAPTER = "lora"
Say = Callable[[str], None]
SETTINGS_AT_ODDS = (ValueError, ImportError, RuntimeError)
"""What transformers says of them."""


@dataclass(frozen=True)
class Plan:
    """All that a run's losses depend on, but for the machine."""

    model: str
    data: str
    content: str
    """A digest of the tokens and labels."""
    config: dict[str, Any]
    settings: dict[str, str]
    lora: int | None
    dtype: str

    @classmethod
    def of(
        cls,
        model: str,
        data: str,
        texts: Texts,
        config: GradientConfig,
        settings: dict[str, str],
        lora: int | None,
        dtype: str,
    ) -> Plan:
        content = hashlib.sha256(json.dumps(texts.pieces).encode()).hexdigest()
        return cls(model, data, content, asdict(config), settings, lora, dtype)


@dataclass(frozen=True)
class Ended:
    """What a run came to; seconds and operations are of the part since it was resumed."""

    steps: int
    first_loss: float
    last_loss: float
    eval_loss: float | None
    tokens: float
    trained: float
    flops_of_standard: float | None
    seconds: float
    engine: str
    resumed_at: int


def run(
    model: Any,
    tokenizer: Any,
    texts: Texts,
    folder: Path,
    plan: Plan,
    *,
    evaluation: Texts | None = None,
    resume: bool = False,
    say: Say = print,
) -> Ended:
    """Train `model` on `texts`, or go on with that where a kill left it; save what it became."""
    args = arguments(folder, plan.settings)
    checkpoint = prepare(folder, plan, resume, say)
    use_cache = model.config.use_cache
    config = GradientConfig(**plan.config)
    with _nothing_begun(folder, checkpoint):
        if plan.lora is not None:
            model = with_lora(model, plan.lora, args.seed)
        trainer = Trainer(
            model,
            args,
            data_collator=Padded(tokenizer),
            train_dataset=numbered(texts.pieces) if config.refresh > 1 else texts.pieces,
            eval_dataset=evaluation.pieces if evaluation else None,
            callbacks=[Lines(say)],
        )
        gradients = make_selective(trainer, config)
    CompleteCheckpoint.last_of(trainer)
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    if checkpoint is None or not _at_its_end(trainer, checkpoint):
        with finish_step_on_interrupt(trainer):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - began
    loss = trainer.evaluate()["eval_loss"] if evaluation else None
    gradients.detach()
    trainer.model.config.use_cache = use_cache
    save(trainer.model, tokenizer, folder)
    at = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    ended = _ended(trainer.state, gradients, loss, seconds, at)
    write_record(folder, plan, ended)
    return ended


@contextmanager
def _nothing_begun(folder: Path, checkpoint: Path | None) -> Iterator[None]:
    """What fails in here is the settings' fault: with others, the folder may be used again."""
    try:
        yield
    except Exception as error:
        if checkpoint is None:
            (folder / RECORD).unlink(missing_ok=True)
        if isinstance(error, PliantError) or not isinstance(error, SETTINGS_AT_ODDS):
            raise
        raise InvalidInput(f"--set: {' '.join(str(error).split())[:300]}") from error


def _at_its_end(trainer: Trainer, checkpoint: Path) -> bool:
    """Whether nothing but saving is left to do (the Trainer would train for one step more)."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps:
        return False
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = state
    return True


class Lines(TrainerCallback):
    """Says a line at each log, and lets the last step be logged, whichever it is."""

    def __init__(self, say: Say) -> None:
        self.say = say

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            ratio = logs.get(PREFIX + "ratio")
            trained = "" if ratio is None else f", {ratio:.0%} of the tokens trained"
            self.say(
                f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.4f}{trained}"
            )
        elif "eval_loss" in logs:
            self.say(f"step {state.global_step}: evaluation loss {logs['eval_loss']:.4f}")


# --- the folder ----------------------------------------------------------------------------------


def prepare(folder: Path, plan: Plan, resume: bool, say: Say) -> Path | None:
    """The checkpoint to go on from, if there is one; the folder is this run's from now on."""
    before = read_record(folder)
    if before is None:
        _refuse_foreign(folder)
        if resume:
            say(f"{folder} holds no run yet: starting one")
        folder.mkdir(parents=True, exist_ok=True)
        write_record(folder, plan, None)
        return None
    if not resume:
        raise InvalidInput(f"{folder}: holds a run already: add --resume, or give another --out")
    _refuse_another(folder, before, plan)
    for name in remove_incomplete(folder):
        say(f"{name} was not finished when the run ended: it is left out")
    found = last_complete(folder)
    say(f"resuming from {found.name}" if found else "no checkpoint yet: starting again")
    return found


def read_record(folder: Path) -> dict[str, Any] | None:
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        assert isinstance(content["plan"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise InvalidInput(f"{path}: damaged; give another --out") from error
    return dict(content)


def write_record(folder: Path, plan: Plan, ended: Ended | None) -> None:
    content = {"pliant": __version__, "plan": asdict(plan)}
    if ended is not None:
        content["ended"] = asdict(ended)
    write_file(folder / RECORD, (json.dumps(content, indent=2) + "\n").encode())


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InvalidInput(f"{folder} is a file: --out names a folder")
    if folder.is_dir() and any(folder.iterdir()):
        what = "checkpoints of some other training" if checkpoints(folder) else "something else"
        raise InvalidInput(f"{folder}: is not empty (it holds {what}): give another --out")


def _refuse_another(folder: Path, before: dict[str, Any], plan: Plan) -> None:
    now = json.loads(json.dumps(asdict(plan)))
    for key, value in before["plan"].items():
        if now.get(key) == value or key == "data":
            continue
        if isinstance(value, dict) and isinstance(now.get(key), dict):
            names = {k for k in value.keys() | now[key].keys() if value.get(k) != now[key].get(k)}
            key = f"{key} ({', '.join(sorted(names))})"
        what = "other data" if key == "content" else f"another {key}"
        raise InvalidInput(
            f"{folder}: this run was begun with {what}: resume it as it was begun, or give "
            "another --out"
        )


# --- the model -----------------------------------------------------------------------------------


def with_lora(model: Any, rank: int, seed: int) -> Any:
    """Low-rank matrices on every linear layer but the head; they alone are trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(seed)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, settings)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """The stock model into `folder`: written beside, and then moved. LoRA is merged into it, and
    kept by itself as well."""
    beside = folder / UNFINISHED
    shutil.rmtree(beside, ignore_errors=True)
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(folder / ADAPTER)
        model = model.merge_and_unload()
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    for path in beside.iterdir():
        os.replace(path, folder / path.name)
    beside.rmdir()


def _ended(
    state: TrainerState, gradients: Gradients, loss: float | None, seconds: float, at: int
) -> Ended:
    logs = [entry for entry in state.log_history if "loss" in entry]

    def total(key: str) -> float:
        return float(sum(entry.get(PREFIX + key, 0.0) for entry in logs))

    return Ended(
        steps=state.global_step,
        first_loss=logs[0]["loss"] if logs else float("nan"),
        last_loss=logs[-1]["loss"] if logs else float("nan"),
        eval_loss=loss,
        tokens=total("tokens_total"),
        trained=total("tokens_selected"),
        flops_of_standard=gradients.totals().get("flops_of_standard"),
        seconds=seconds,
        engine=gradients.engine,
        resumed_at=at,
    )
