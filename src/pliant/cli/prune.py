"""`pliant prune MODEL`: a smaller stock model, compensated for what it lost, and proven equal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from pliant.cli import terminal
from pliant.cli.importance import Bar, ImportanceOptions, calibration_rows, fitting_length
from pliant.errors import InvalidInput
from pliant.options import Flag
from pliant.reports.tables import Table

if TYPE_CHECKING:
    from pliant.structure import PruneConfig

HELD_OUT = 4  # of the batches, one in so many is kept to measure perplexity on
CONTROLS = ("random", "magnitude")


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    model: Annotated[str, Flag(positional=True)]
    """nano-s, nano-l, a folder, or a name on the hub."""
    out: Path | None = None
    """The smaller model's new folder. Left out: nothing is written, the table alone is printed."""
    budget: float | None = None
    """The share of all parameters to remove; --parts says from what."""
    parts: tuple[str, ...] = ()
    """channels or heads; repeatable. Each loses the same share of its units. Default: channels."""
    channels: float = 0.0
    """Instead of a budget: the share of the MLP's channels to remove."""
    heads: float = 0.0
    """Instead of a budget: the share of the attention heads to remove."""
    data: str | None = None
    """Calibration text (.txt); rows with text, prompt and completion, or messages (.jsonl, ...); a
    hub data set (name:split); or nano, the default for nano models: questions of their world."""
    tokens: Annotated[int, Ge(1)] = 16384
    """How much calibration text is read, in tokens; a quarter of it measures the perplexity."""
    length: Annotated[int, Ge(2)] = 256
    """The longest piece of text, in tokens."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Pieces of text per batch."""
    rows: Annotated[int, Ge(1)] | None = None
    """Read only this many rows of the data."""
    score: str = "error"
    """Which units go first: error, activation, magnitude or random."""
    compensate: bool = True
    """Give the projections new weights, so that the rest takes over."""
    controls: bool = True
    """Measure random and smallest-weight units beside it, at the same size."""
    dtype: str = "float32"
    """The weights' type: float32, bfloat16, ..."""
    device: str | None = None
    """cpu, cuda, ..."""
    json: bool = False
    """Print one JSON document."""


def prune(options: PruneOptions) -> None:
    """Remove channels or heads from a model and write what remains as a stock checkpoint.

    The units that the others can best do without go, and the others take over what they can. The
    perplexity is measured on text that was not used for it, beside two simple ways to prune. The
    smaller model is compared with the pruned one before it is kept.

    Example: pliant prune nano-l --budget 0.2 --out smaller
    """
    check(options)
    rows = calibration_rows(_calibration(options))
    terminal.hide_loading_bars()
    from pliant.loading import load

    model, tokenizer = load(options.model, dtype=options.dtype, device=options.device)
    from pliant.structure import calibration_batches, export, perplexity
    from pliant.structure import prune as apply

    config = settings(options, model)
    batches = calibration_batches(
        rows,
        tokenizer,
        tokens=options.tokens,
        length=fitting_length(options.length, model),
        rows=options.batch_size,
    )
    held_out, fitted = batches[::HELD_OUT], [b for i, b in enumerate(batches) if i % HELD_OUT]
    if not fitted:
        raise InvalidInput(
            f"--tokens {options.tokens} is one batch: give more tokens or a smaller --batch-size"
        )
    measured = {"the whole model": perplexity(model, held_out)}
    for name, control in controls(options, config):
        pruned = apply(model, fitted, control)
        measured[name] = perplexity(model, held_out)
        pruned.detach()
    with Bar("pruning layers") as bar:
        pruned = apply(model, fitted, config, report=lambda _, done, total: bar(done, total))
    measured[_name(config)] = perplexity(model, held_out)
    result = None if options.out is None else export(model, options.out, tokenizer)
    content = {"model": options.model, "perplexity": measured, **pruned.as_dict()}
    content |= {"export": None if result is None else result.as_dict()}
    if options.json:
        terminal.print_json(content)
        return
    sentences = [str(pruned), *([] if result is None else [str(result)])]
    terminal.draw([table(options.model, measured)], sentences)


def check(options: PruneOptions) -> None:
    """Refuse what cannot be done before a model is loaded."""
    shares = {"--channels": options.channels, "--heads": options.heads}
    given = [name for name, share in shares.items() if share]
    if (options.budget is None) == (not given):
        raise InvalidInput("give --budget, or --channels and --heads")
    if options.budget is not None and not 0 < options.budget < 1:
        raise InvalidInput(f"--budget {options.budget:g}: give a share above 0 and below 1")
    for part in options.parts:
        if part not in ("channels", "heads"):
            raise InvalidInput(f"--parts {part}: give channels or heads")
    out = options.out
    if out is not None and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise InvalidInput(f"--out {out}: exists already; name a new folder")
    if not options.budget:
        settings(options, None)
    from pliant.structure import PruneConfig

    PruneConfig(channels=0.5, score=options.score)  # type: ignore[arg-type]


def settings(options: PruneOptions, model: Any) -> PruneConfig:
    """The shares that the options ask for, or that make up the budget."""
    from pliant.structure import PruneConfig

    shares = {"channels": options.channels, "heads": options.heads}
    if options.budget is not None:
        from pliant.structure.smaller import shares_for

        parts: Any = options.parts or ("channels",)
        shares = shares_for(model, options.budget, parts)
    return PruneConfig(**shares, score=options.score, compensate=options.compensate)  # type: ignore[arg-type]


def controls(options: PruneOptions, config: PruneConfig) -> Iterator[tuple[str, PruneConfig]]:
    for score in CONTROLS if options.controls else ():
        control = replace(config, score=score, compensate=False)  # type: ignore[arg-type]
        yield _name(control), control


def table(model: str, measured: dict[str, float]) -> Table:
    whole = next(iter(measured.values()))
    rows = [[name, f"{value:.4g}", f"{value / whole:.3f}"] for name, value in measured.items()]
    head = ["which", "perplexity", "of the whole"]
    return Table(f"{model}, on held-out text", head, rows, right=frozenset(head[1:]))


def _name(config: PruneConfig) -> str:
    shares = {"heads": config.heads, "channels": config.channels}
    what = " and ".join(f"{share:.0%} of {kind}" for kind, share in shares.items() if share)
    how = "compensated" if config.compensate else "not compensated"
    return f"{what} removed by {config.score}, {how}"


def _calibration(options: PruneOptions) -> ImportanceOptions:
    """The options that name the calibration text, as `pliant importance` reads them."""
    return ImportanceOptions(
        model=options.model,
        data=options.data,
        tokens=options.tokens,
        length=options.length,
        rows=options.rows,
        score="activation",
    )
