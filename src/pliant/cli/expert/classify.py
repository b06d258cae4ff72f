"""`pliant expert classify`: which expert does each prompt need? And fit a head that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pliant.cli import terminal
from pliant.cli.expert.choosing import ChoosingOptions, choice_line, read_prompts
from pliant.cli.shared_options import PromptColumns
from pliant.errors import InvalidInput
from pliant.options import Flag

if TYPE_CHECKING:
    from pliant.experts.adapting import Choice

BASE = "base"


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions(ChoosingOptions, PromptColumns):
    prompt: Annotated[tuple[str, ...], Flag(positional=True)] = ()
    """One or more. Default: --data, or one is read from stdin."""
    data: str | None = None
    """A file or data set of prompts; with a column `expert`, the choices are compared with it.
    Default: the prompts are arguments."""
    out: Path | None = None
    """Fit a head on the column `expert` of --data, and write it to this new folder. Default: choose
    an expert for each prompt."""
    layer: int | None = None
    """How many layers run before the head reads. Default: the best on held-out prompts."""
    seed: int = 0
    """Of the held-out prompts."""


def classify(options: ClassifyOptions) -> None:
    """Show which expert each prompt needs, or fit a classifier on labelled prompts (--out).

    In the column `expert`, `base` means that no expert should answer.

    Example: pliant expert classify --experts my-experts "What is 17 + 4?"
    """
    options.check()
    rows = _rows(options)
    if options.out is not None:
        _fit(options, rows)
        return
    strategy = options.strategy(*options.loaded())
    choices = strategy.choose([row["prompt"] for row in rows])
    known = [row["expert"] for row in rows if "expert" in row]
    right = _share(choices, known) if len(known) == len(rows) else None
    if options.json:
        shown = [
            {"prompt": row["prompt"], **choice.as_dict()}
            for row, choice in zip(rows, choices, strict=True)
        ]
        terminal.print_json({"choices": shown, "accuracy": right})
        return
    if right is None:
        for choice in choices:
            terminal.print_text(choice_line(choice))
        return
    terminal.draw([_table(choices, known)])
    terminal.print_text(f"{right:.1%} of {len(rows):,} prompts are classified right.")


def _rows(options: ClassifyOptions) -> list[dict[str, Any]]:
    if options.data is None:
        if options.out is not None:
            raise InvalidInput("--out needs --data: prompts with their expert to learn from")
        return [{"prompt": prompt} for prompt in read_prompts(options.prompt)]
    if options.prompt:
        raise InvalidInput("a prompt and --data: give one of them")
    if options.out is not None:
        from pliant.files import check_new

        if options.classifier is not None or options.label or options.by == "prompt":
            raise InvalidInput("--out fits a new head: leave out --classifier, --label and --by")
        check_new(options.out.expanduser())
        return options.read(options.data, "expert")
    return options.read(options.data)


def _fit(options: ClassifyOptions, rows: Sequence[dict[str, Any]]) -> None:
    from pliant.experts.adapting import ByClassifier, ClassifierConfig

    assert options.out is not None
    given: dict[str, Any] = {} if options.threshold is None else {"threshold": options.threshold}
    config = ClassifierConfig(layer=options.layer, seed=options.seed, **given)
    model, tokenizer = options.loaded()
    head = ByClassifier.fit(
        model, tokenizer, [r["prompt"] for r in rows], [r["expert"] or None for r in rows], config
    )
    head.save_pretrained(options.out.expanduser())
    assert head.fitted is not None
    if options.json:
        terminal.print_json({**head.fitted.as_dict(), "folder": str(options.out)})
        return
    terminal.print_text(f"{head.fitted}; written to {options.out}.")


def _share(choices: Sequence[Choice], known: Sequence[str | None]) -> float:
    pairs = zip(choices, known, strict=True)
    return sum(choice.name == (expert or BASE) for choice, expert in pairs) / len(known)


def _table(choices: Sequence[Choice], known: Sequence[str | None]) -> Any:
    """Prompts by the expert that they need and the one that is chosen."""
    from pliant.reports.tables import Table

    pairs = [(expert or BASE, c.name) for c, expert in zip(choices, known, strict=True)]
    needed = sorted({need for need, _ in pairs})
    chosen = sorted({choice for _, choice in pairs})
    cells = [[need, *(str(pairs.count((need, each))) for each in chosen)] for need in needed]
    return Table("Needed and chosen", ["needs", *chosen], cells, right=frozenset(chosen))
