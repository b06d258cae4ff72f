"""`pliant recover SMALLER`: train what pruning has left, in a folder that survives a kill."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from pliant.cli import terminal
from pliant.cli.gradients.inputs import quiet_libraries
from pliant.cli.shared_options import EngineOrStandard, RowOptions, TrainerOptions, load_to_train
from pliant.cli.training_text import check_template, encode, read_data
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.loading.dtypes import Dtype
from pliant.options import Flag, named_values
from pliant.reports.tables import Table

if TYPE_CHECKING:
    from pliant.structure.recovery import Engine, RecoveryConfig, RecoveryResult
    from pliant.training.texts import Texts

QUESTIONS = 1000
STANDARD = "standard"


@dataclass(frozen=True, kw_only=True)
class RecoverOptions(RowOptions, TrainerOptions):
    model: Annotated[str, Flag(positional=True)]
    """The smaller model: the folder that `pliant prune --out` wrote, or any other model."""
    data: str
    """Text (.txt); rows with text, prompt and completion, or messages, of Alpaca or ShareGPT
    (.jsonl, ...); a hub data set (name:split); or nano: questions of the embedded models' world."""
    out: Path
    """The run's folder, and in the end the recovered model's."""
    teacher: str | None = None
    """The model before pruning: its predictions are learned as well. Default: none."""
    adapters: Path | None = None
    """What `pliant prune --adapters` wrote for MODEL, the whole model: it is trained with its gates
    on (--train lora or norms), is its own teacher with them off, and then made smaller. Default:
    none, MODEL is smaller already."""
    train: Literal["all", "lora", "norms"] = "all"
    """What is trained: all weights, or lora or norms, which take less memory."""
    rank: Annotated[int, Ge(1)] = 16
    """Of the low-rank matrices."""
    distill: float | None = None
    """The share of the loss that comes from the teacher, 0 to 1. Default: 0.5 with a teacher. 0:
    the teacher only tells how much was lost."""
    temperature: float = 1.0
    """Softens the predictions that are compared."""
    engine: EngineOrStandard = "standard"
    """standard: every token is trained. auto: a short race decides, as in `pliant train`. Else how
    selected tokens are trained, on the text alone."""
    choose: Annotated[tuple[str, ...], Flag(metavar="NAME=VALUE")] = ()
    """For another engine: any field of GradientConfig, as ratio=0.5; repeatable. Default: its own
    values."""
    length: Annotated[int, Ge(2)] = 512
    """The longest piece of text, in tokens."""
    evaluate: str | None = None
    """Data like --data to measure the loss on. Default: a part of the data is held out."""
    dtype: Dtype = "auto"
    """The models' type. auto: as they were saved."""
    resume: bool = False
    """Resume from the run's last complete checkpoint."""
    json: bool = False
    """Print one JSON document."""

    def config(self) -> RecoveryConfig:
        from pliant.structure.recovery import DISTILL, RecoveryConfig

        taught = self.teacher is not None or self.adapters is not None
        with_teacher = DISTILL if taught and self.engine == STANDARD else 0.0
        return RecoveryConfig(
            train=self.train,
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
    from pliant.structure import recovery

    config = options.config()
    settings = options.settings()
    check(options, config, settings)
    rows = read_data(options.data, "train", QUESTIONS, options)
    measured_on = None
    if options.evaluate is not None:
        measured_on = read_data(options.evaluate, "dev", QUESTIONS, options, evaluates=True)
    terminal.hide_loading_bars()
    check_template(rows, options.model)
    model, tokenizer = load_to_train(options.model, options.dtype, options.device)
    texts = encode(rows, model, tokenizer, options.length)
    held_out = measured_on and encode(measured_on, model, tokenizer, options.length)
    if options.adapters is not None:
        return _recovered_gated(options, config, model, tokenizer, texts, held_out or None)
    teacher = None
    if options.teacher is not None:
        teacher, _ = load_to_train(options.teacher, options.dtype, options.device)
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
            engine=engine_of(options),
            source=Path(options.model),
        )


def _recovered_gated(
    options: RecoverOptions,
    config: RecoveryConfig,
    model: Any,
    tokenizer: Any,
    texts: Texts,
    held_out: Texts | None,
) -> RecoveryResult:
    from pliant.structure import Pruned
    from pliant.structure.recovery import recover_gated

    assert options.adapters is not None
    model.requires_grad_(False)
    pruned = Pruned.load(model, options.adapters)
    with quiet_libraries():
        return recover_gated(
            pruned,
            tokenizer,
            texts,
            options.out,
            config,
            options.resume,
            held_out=held_out,
            settings=options.settings(),
        )


def engine_of(options: RecoverOptions) -> Engine | None:
    """Selective training, on the tokens that the options choose; None for every token."""
    if options.engine == STANDARD:
        if options.choose:
            raise InvalidInput("--choose says which tokens an --engine trains: give one, or auto")
        return None
    from pliant.gradients import selective_run
    from pliant.gradients.config import GradientConfig
    from pliant.gradients.training import make_selective
    from pliant.options import from_texts
    from pliant.structure.recovery import Engine

    auto = options.engine == selective_run.AUTO
    config = from_texts(
        GradientConfig,
        named_values(options.choose, "--choose"),
        "--choose",
        engine=None if auto else options.engine,
    )

    def prepare(trainer: Any, run: Any) -> Any:
        gradients = make_selective(trainer, config)
        if auto:
            trainer.add_callback(selective_run.EngineChoice(run, gradients))
        return gradients.detach

    return Engine({**asdict(config), "auto": auto}, prepare)


def table(out: Path, result: RecoveryResult) -> Table:
    return Table(f"{out}: the recovered model", ["what", "how much"], result.cells())


def check(options: RecoverOptions, config: RecoveryConfig, settings: dict[str, str]) -> None:
    """Refuse what cannot be done before a model is loaded."""
    from pliant.loading import load_config, load_tokenizer
    from pliant.structure import recovery
    from pliant.training.folder import check_folder

    recovery.check_engine(config, engine_of(options))
    gated = options.adapters is not None
    recovery.check_teacher(config, options.teacher is not None or gated)
    if gated:
        _check_gated(options)
    options.check_device(config.arguments(options.out, settings))
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


def _check_gated(options: RecoverOptions) -> None:
    if options.teacher is not None:
        raise InvalidInput("--adapters: the model is its own teacher: leave --teacher out")
    if options.train == "all":
        raise InvalidInput(
            "--adapters trains beside the whole model, which is the teacher: give --train lora or "
            "norms; for all weights, `pliant export` first and recover what that writes"
        )
    if options.engine != STANDARD:
        raise InvalidInput(f"--engine {options.engine}: with --adapters every token is trained")
    assert options.adapters is not None
    if not (options.adapters / "pruned.json").is_file():
        raise InvalidInput(f"--adapters {options.adapters}: holds no saved pruning")


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
