"""`pliant prune MODEL`: a smaller stock model, compensated for what it lost, and proven equal."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from annotated_types import Ge, Le

from pliant.cli import terminal
from pliant.cli.prune import saved
from pliant.cli.recover import QUESTIONS, RecoverOptions, check_model, recovered
from pliant.cli.recover import table as recovery_table
from pliant.cli.shared_options import SEED, DeviceOptions, RowOptions
from pliant.cli.training_text import calibration_rows, default_data, fitting_length, read_data
from pliant.errors import InvalidInput
from pliant.loading.dtypes import Dtype
from pliant.options import Flag
from pliant.reports.tables import Table

if TYPE_CHECKING:
    from pliant.structure import Plan, PlanConfig, PruneConfig
    from pliant.structure.recovery import RecoveryResult

HELD_OUT = 4  # of the batches, one in so many is kept to measure perplexity on
Part = Literal["experts", "heads", "channels", "layers"]
PARTS: tuple[Part, ...] = get_args(Part)
PruneScore = Literal[
    "error", "fisher", "taylor", "leave_one_out", "entropy", "activation", "magnitude", "random"
]


@dataclass(frozen=True, kw_only=True)
class PruneOptions(RowOptions, DeviceOptions):
    model: Annotated[str, Flag(positional=True)]
    """nano-s, nano-l, a folder, or a name on the hub."""
    out: Path | None = None
    """The smaller model's new folder. Left out: nothing is written, the table alone is printed."""
    budget: float | None = None
    """The share to save; what each part should lose for it is found by trying. Default: the shares
    below."""
    budget_of: Literal["parameters", "flops", "kv", "latency"] = "parameters"
    """What to save a share of; kv is bytes of the cache, latency is measured."""
    parts: tuple[Part, ...] = ()
    """What may lose units for the budget; repeatable. Default: all that a smaller stock model can
    have fewer of."""
    channels: float = 0.0
    """Instead of a budget: the share of the MLP's channels to remove."""
    heads: float = 0.0
    """Instead of a budget: the share of the attention heads to remove."""
    experts: Annotated[float, Flag(group="Method")] = 0.0
    """Instead of a budget: the share of a mixture's experts to remove."""
    layers: float = 0.0
    """Instead of a budget: the share of the layers to remove."""
    data: str | None = None
    """Calibration text (.txt); rows with text, prompt and completion, or messages, of Alpaca or
    ShareGPT (.jsonl, ...); a hub data set (name:split); or nano: questions of the embedded models'
    world. Default: nano, for nano models."""
    tokens: Annotated[int, Ge(1)] = 16384
    """How much calibration text is read, in tokens; a quarter of it measures the perplexity."""
    length: Annotated[int, Ge(2)] = 256
    """The longest piece of text, in tokens."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Pieces of text per batch."""
    score: PruneScore = "error"
    """Which units go first: error, or a score of `pliant importance` that ranks them."""
    compensate: bool = True
    """Give the projections new weights, so that the rest takes over."""
    uniform: bool = True
    """Every layer loses the same share of its heads and channels. Off: layers in which that costs
    less lose more, which nearly no stock config can express: see --zeros."""
    zeros: bool = False
    """Where a stock checkpoint needs units that are pruned, write weights of zero in their place:
    it computes the same, and is larger than it could be."""
    controls: bool = True
    """Measure random and smallest-weight units beside it, at the same size."""
    recover: str | None = None
    """Data to train the smaller model on afterwards, with the whole one as its teacher. --out then
    holds the recovered model, and OUT-pruned the one before. See `pliant recover`. Default: the
    smaller model is not trained."""
    set: Annotated[tuple[str, ...], Flag(metavar="NAME=VALUE")] = ()
    """For --recover: any field of TrainingArguments; repeatable. Default: those of `pliant
    recover`."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """For --recover: also log to tensorboard (in OUT/runs) or wandb."""
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] | None = None
    """Of units drawn at random, and of the training of --recover. Default: 0, and 42."""
    adapters: Annotated[Path | None, Flag(group="Output")] = None
    """Write the gates and new weights to this folder, for `pliant export`. Default: none."""
    report: Path | None = None
    """Write a page (.html): quality against size, heat maps, sizes and speeds, and two texts.
    Default: none."""
    dtype: Dtype = "float32"
    """The weights' type."""
    json: bool = False
    """Print one JSON document."""

    def shares(self) -> dict[str, float]:
        return {part: share for part in PARTS if (share := getattr(self, part))}

    def pruned_out(self) -> Path | None:
        """The folder of the smaller model before any training."""
        if self.out is None or self.recover is None:
            return self.out
        return self.out.parent / f"{self.out.name}-pruned"

    def config(self) -> PlanConfig | PruneConfig:
        """What the options ask for."""
        from pliant.structure import PlanConfig, PruneConfig

        how: dict[str, Any] = {"score": self.score, "compensate": self.compensate}
        how |= {"uniform": self.uniform, "seed": self.seed or 0}
        if self.budget is None:
            return PruneConfig(**{**how, **self.shares()})
        parts: Any = self.parts or PARTS
        return PlanConfig(self.budget, self.budget_of, parts, **how)


def prune(options: PruneOptions) -> None:
    """Remove channels, heads, experts or layers, and write what remains as a stock checkpoint.

    The units that the others can best do without go, and the others take over what they can. The
    perplexity is measured on text that was not used for it, beside two simple ways to prune. The
    smaller model is compared with the pruned one before it is kept.

    Example: pliant prune nano-l --budget 0.2 --out smaller
    """
    check(options)
    data = options.data or default_data(options.model)
    rows = calibration_rows(data, options.tokens, options)
    check_inputs(options)
    content, table, sentences = _prune(options, rows)
    if not options.json:  # now, for a recovery takes a while and may be interrupted
        terminal.draw([table], sentences)
    if options.recover is not None:
        result = _recovered(options)
        content |= {"recovery": result.as_dict()}
        if not options.json:
            assert options.out is not None
            terminal.draw([recovery_table(options.out, result)], [str(result)])
    if options.json:
        terminal.print_json(content)


def _prune(
    options: PruneOptions, rows: list[dict[str, Any]]
) -> tuple[dict[str, Any], Table, list[str]]:
    """Plan, prune, measure and export; the whole model is free again when this returns."""
    config = options.config()
    terminal.hide_loading_bars()
    from pliant.loading import load

    model, tokenizer = load(options.model, dtype=options.dtype, device=options.device)
    model.requires_grad_(False)
    from pliant.cli.prune.page import Page, curve_table
    from pliant.structure import Pruned, calibration_batches, export, plan_pruning
    from pliant.structure import prune as apply

    length = fitting_length(options.length, model.config)
    batches = calibration_batches(
        rows, tokenizer, tokens=options.tokens, length=length, rows=options.batch_size
    )
    held_out, fitted = batches[::HELD_OUT], [b for i, b in enumerate(batches) if i % HELD_OUT]
    if not fitted:
        raise InvalidInput(
            f"--tokens {options.tokens} is one batch: give more tokens or a smaller --batch-size"
        )
    plan = _saved_plan(options)
    with terminal.Stages() as stages:
        if goes_on := plan is not None:
            stages(f"going on from {options.adapters}", 0, 1)
        else:
            plan = plan_pruning(
                model, fitted, held_out, config, controls=options.controls, report=stages
            )
        assert plan is not None
        page = Page(options.model, model, tokenizer, held_out[0], plan) if options.report else None
        if goes_on and options.adapters is not None:
            pruned = Pruned.load(model, options.adapters)
        else:
            order = plan.layer_order if plan.config.score == "error" else ()
            pruned = apply(model, fitted, plan.config, layer_order=order, report=stages)
            if options.adapters is not None:
                pruned.save(options.adapters, saved.notes(asdict(options), plan))
        out = options.pruned_out()
        result = (
            None
            if out is None
            else export(model, out, tokenizer, zeros=options.zeros, report=stages)
        )
    if page is not None and options.report is not None:
        page.write(options.report, pruned, result)
    content = {"model": options.model, "plan": plan.as_dict(), **pruned.as_dict()}
    content |= {"export": None if result is None else result.as_dict()}
    left_out = [f"{part} stay: {why}" for part, why in left_out_parts(options, plan).items()]
    sentences = [*left_out, str(plan), *([] if result is None else [str(result)])]
    sentences += [] if options.report is None else [f"The same as pictures: {options.report}"]
    return content, curve_table(options.model, plan), sentences


def _saved_plan(options: PruneOptions) -> Plan | None:
    """That of the pruning in --adapters, if this very command made it and was interrupted.

    If it was not, or has nothing left to do, the folder is in use.
    """
    if options.adapters is None or (options.out is None and options.report is None):
        return None
    return saved.plan_of(options.adapters, asdict(options))


def _recovered(options: PruneOptions) -> RecoveryResult:
    own = _recovery(options)
    try:
        return recovered(own)
    except KeyboardInterrupt as stop:
        words = ["pliant", "recover", own.model, "--data", own.data, "--teacher", str(own.teacher)]
        words += ["--out", str(own.out), "--length", str(own.length)]
        words += [word for each in own.set for word in ("--set", each)]
        raise KeyboardInterrupt(
            f"{own.model} holds the pruned model; go on with: {shlex.join(words)} --resume"
        ) from stop


def _recovery(options: PruneOptions) -> RecoverOptions:
    from pliant.loading import load_config

    assert options.out is not None and options.recover is not None
    return RecoverOptions(
        model=str(options.pruned_out()),
        data=options.recover,
        out=options.out,
        teacher=options.model,
        set=options.set,
        report_to=options.report_to,
        device=options.device,
        seed=SEED if options.seed is None else options.seed,
        text_column=options.text_column,
        prompt_column=options.prompt_column,
        completion_column=options.completion_column,
        messages_column=options.messages_column,
        length=fitting_length(options.length, load_config(options.model)),
    )


def check(options: PruneOptions) -> None:
    """Refuse what makes no sense, whatever the model and the data are."""
    if (options.budget is None) == (not options.shares()):
        raise InvalidInput("give --budget, or shares of --channels, --heads, --experts or --layers")
    if options.parts and options.budget is None:
        raise InvalidInput("--parts says what a --budget is saved from: give a budget")
    if options.budget_of != "parameters" and options.budget is None:
        raise InvalidInput("--budget-of says what a --budget is a share of: give a budget")
    if not options.uniform and options.out is not None and not options.zeros:
        raise InvalidInput(
            "--no-uniform: nearly every stock config has one number of heads and channels for all "
            "layers. Give --zeros to write weights of zero where a layer loses more than others, "
            "or --adapters without --out"
        )
    config = options.config()
    from pliant.structure.pruning.prune import check_score

    check_score(config.parts, config.score)
    if options.recover is None and options.set:
        raise InvalidInput(
            "--set is for the training that --recover asks for: give data to train on"
        )
    if options.recover is not None and options.out is None:
        raise InvalidInput("--recover trains what is written: give --out")
    _check_places(options)


def _check_places(options: PruneOptions) -> None:
    """Refuse folders that are in use or lie in each other, and a page that cannot be written."""
    from pliant.files import check_new
    from pliant.reports.page import check_writable

    folders = {"--out": options.out, "--adapters": options.adapters}
    if options.recover is not None:
        folders["--out before --recover"] = options.pruned_out()
    places = {flag: path for flag, path in folders.items() if path is not None}
    for flag, path in places.items():
        if flag != "--adapters" or _saved_plan(options) is None:
            check_new(path.expanduser())
    if options.report is not None:
        if options.report.suffix != ".html":
            raise InvalidInput(f"--report {options.report}: name an .html file")
        check_writable(options.report)
        if options.recover is not None:  # a run begins in an empty folder
            places["--report"] = options.report
    for (flag, path), (other, inner) in permutations(places.items(), 2):
        if path.absolute() in (inner.absolute(), *inner.absolute().parents):
            raise InvalidInput(f"{flag} {path} and {other} {inner}: give each a place of its own")


def check_inputs(options: PruneOptions) -> None:
    """Refuse an unknown or quantised model, and data that no recovery can be trained on."""
    from pliant.loading import load_tokenizer

    check_model(options.model)
    if options.recover is None:
        return
    from pliant.structure.recovery import split
    from pliant.training.texts import texts

    own = _recovery(options)
    own.check_device(own.config().arguments(own.out, own.settings()))
    rows = read_data(own.data, "train", QUESTIONS, own)
    split(texts(rows, load_tokenizer(options.model), own.length))


def left_out_parts(options: PruneOptions, plan: Plan) -> dict[str, str]:
    """Parts that were asked for by name and have no smaller stock form."""
    return {str(p): why for p, why in plan.costs.why_not.items() if p in options.parts}
