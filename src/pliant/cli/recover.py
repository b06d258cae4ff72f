"""`pliant recover SMALLER`: train what pruning has left, in a folder that survives a kill."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from pliant.cli import terminal
from pliant.cli.gradients.inputs import quiet_libraries
from pliant.cli.training_text import EMBEDDED, encode, read_data
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.options import Flag, named_values
from pliant.reports.tables import Table

if TYPE_CHECKING:
    from pliant.structure.recovery import RecoveryConfig, RecoveryResult

QUESTIONS = 1000


@dataclass(frozen=True, kw_only=True)
class RecoverOptions:
    model: Annotated[str, Flag(positional=True)]
    """The smaller model: the folder that `pliant prune --out` wrote, or any other model."""
    data: str
    """Text (.txt); rows with text, prompt and completion, or messages (.jsonl, ...); a hub data set
    (name:split); or nano: questions of the embedded models' world."""
    out: Path
    """The run's folder, and in the end the recovered model's."""
    teacher: str | None = None
    """The model before pruning: its predictions are learned as well."""
    train: str = "all"
    """What is trained: all weights, or lora or norms, which take less memory."""
    rank: Annotated[int, Ge(1)] = 16
    """Of the low-rank matrices."""
    distill: float | None = None
    """The share of the loss that comes from the teacher, 0 to 1. Default: 0.5 with a teacher. 0:
    the teacher only tells how much was lost."""
    temperature: float = 1.0
    """Softens the predictions that are compared."""
    set: Annotated[tuple[str, ...], Flag(metavar="NAME=VALUE")] = ()
    """Any field of TrainingArguments; repeatable."""
    length: Annotated[int, Ge(2)] = 512
    """The longest piece of text, in tokens."""
    rows: Annotated[int, Ge(1)] | None = None
    """Read only this many rows."""
    subset: str | None = None
    """The subset of a data set on the hub."""
    evaluate: str | None = None
    """Data like --data to measure the loss on. Default: a part of the data is held out."""
    dtype: str = "auto"
    """The models' type: float32, bfloat16, ... Default: as they were saved."""
    resume: bool = False
    """Resume from the run's last complete checkpoint."""
    json: bool = False
    """Print one JSON document."""

    def config(self) -> RecoveryConfig:
        from pliant.structure.recovery import DISTILL, RecoveryConfig

        with_teacher = DISTILL if self.teacher is not None else 0.0
        return RecoveryConfig(
            train=self.train,  # type: ignore[arg-type]
            rank=self.rank,
            distill=with_teacher if self.distill is None else self.distill,
            temperature=self.temperature,
        )


def recover(options: RecoverOptions) -> None:
    """Train a smaller model until it predicts almost as the whole one did.

    Killed at any moment, the run loses only the steps since its last checkpoint: the same command
    with --resume continues there and reaches the same losses. What it writes is a stock model.

    Example: pliant recover smaller --data notes.txt --teacher nano-l --out recovered
    """
    result = recovered(options)
    if options.json:
        terminal.print_json({"out": str(options.out), **result.as_dict()})
        return
    terminal.draw([table(options.out, result)], [str(result)])


def recovered(options: RecoverOptions) -> RecoveryResult:
    from pliant.loading import load
    from pliant.structure import recovery

    config = options.config()
    settings = named_values(options.set, "--set")
    check(options, config, settings)
    rows = read_data(options.data, "train", QUESTIONS, limit=options.rows, subset=options.subset)
    measured_on = None
    if options.evaluate is not None:
        limit = options.rows if options.evaluate == EMBEDDED else None
        measured_on = read_data(options.evaluate, "dev", QUESTIONS, limit=limit)
    terminal.hide_loading_bars()
    model, tokenizer = load(options.model, dtype=options.dtype)
    texts = encode(rows, model, tokenizer, options.length)
    held_out = measured_on and encode(measured_on, model, tokenizer, options.length)
    teacher = None
    if options.teacher is not None:
        teacher, _ = load(options.teacher, dtype=options.dtype)
    with quiet_libraries():
        return recovery.recover(
            model,
            tokenizer,
            texts,
            options.out,
            config,
            teacher,
            options.resume,
            held_out=held_out or None,
            settings=settings,
            source=Path(options.model),
        )


def table(out: Path, result: RecoveryResult) -> Table:
    return Table(f"{out}: the recovered model", ["what", "how much"], result.cells())


def check(options: RecoverOptions, config: RecoveryConfig, settings: dict[str, str]) -> None:
    """Refuse what cannot be done before a model is loaded."""
    from pliant.loading import load_config, load_tokenizer
    from pliant.structure import recovery
    from pliant.training.run import check_folder

    recovery.check_teacher(config, options.teacher is not None)
    config.arguments(options.out, settings)
    check_folder(options.out, options.resume)
    check_model(options.model)
    if options.teacher is None:
        return
    sizes = [_vocabulary_size(load_config(name)) for name in (options.model, options.teacher)]
    recovery.check_vocabularies(*sizes)
    vocabularies = [load_tokenizer(n).get_vocab() for n in (options.model, options.teacher)]
    if vocabularies[0] != vocabularies[1]:
        raise InvalidInput(
            f"--teacher {options.teacher}: its tokenizer has another vocabulary than the model's: "
            "give the model before pruning"
        )


def check_model(name: str) -> None:
    """Refuse an unknown model, and a quantised one; a GGUF file is converted when it is loaded."""
    from pliant.loading import load_config, resolve

    config = load_config(name)
    if getattr(config, "quantization_config", None) and not resolve(name).gguf:
        raise UnsupportedModel(
            f"{name} is quantised: give the model of 16 or 32 bits that it was made of"
        )


def _vocabulary_size(config: Any) -> int:
    size: int = config.get_text_config(decoder=True).vocab_size
    return size
