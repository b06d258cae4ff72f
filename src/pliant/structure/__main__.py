"""`python -m pliant.structure MODEL ...`: do models generate with gates, and pruned?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from pliant.cli import terminal
from pliant.cli.app import run_program
from pliant.errors import PliantError
from pliant.options import Flag
from pliant.reports.tables import Table
from pliant.structure.generation_check import (
    CheckConfig,
    CheckResult,
    Strategy,
    check_generation,
)

YES_NO = {"yes": "green", "no": "red"}


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    models: Annotated[tuple[str, ...], Flag(positional=True, metavar="MODEL...")]
    """Embedded models, folders or names on the hub."""
    pruning: float = CheckConfig.pruning
    """The share of all heads to prune, between 0 and 1."""
    strategy: Strategy = CheckConfig.strategy
    """Which heads go: random ones, those of the smallest output weights, or those of the most
    even attention."""
    prompt: str = CheckConfig.prompt
    """What to continue, greedily."""
    max_length: Annotated[int, Ge(2)] = CheckConfig.max_length
    """Tokens of the prompt and its continuation together."""
    seed: int = CheckConfig.seed
    """Of random pruning."""
    device: str | None = None
    """Where the models run: cpu, cuda, ..."""
    json: bool = False
    """Print one JSON document instead of a table."""

    def config(self) -> CheckConfig:
        return CheckConfig(self.pruning, self.strategy, self.prompt, self.max_length, self.seed)


def structure(options: CheckOptions) -> None:
    """Load each model, put gates on its heads, generate, prune heads and generate again.

    Exit code 2 if any of the models could not be used or failed a check.

    Example: python -m pliant.structure nano-s nano-l --pruning 0.5 --strategy magnitude
    """
    config = options.config()
    terminal.hide_loading_bars()
    results = [
        check_generation(name, config, options.device)
        for name in terminal.track(options.models, "models")
    ]
    if options.json:
        terminal.print_json([result.as_dict() for result in results])
    else:
        terminal.draw([table(results, config)], texts(results))
    if failed := [result.model for result in results if not result.ok]:
        raise PliantError(f"{len(failed)} of {len(results)} models failed: {', '.join(failed)}")


def table(results: Sequence[CheckResult], config: CheckConfig) -> Table:
    head = ["architecture", "model", "heads", "identical at gates 1", "generates", "pruned"]
    head += ["pruned generates", "tokens unchanged", "restored", "reason"]
    title = f"Generation with {config.pruning:.0%} of the heads pruned ({config.strategy})"
    right = frozenset(["heads", "pruned", "tokens unchanged"])
    return Table(title, head, [_row(result) for result in results], right, YES_NO)


def texts(results: Sequence[CheckResult]) -> list[str]:
    """What each model generates, before and after pruning."""
    return [
        f"{result.model}{kind}: {' '.join(text.split())}"
        for result in results
        if not result.reason
        for kind, text in (("", result.text), (", pruned", result.pruned_text))
    ]


def _row(result: CheckResult) -> list[str]:
    if result.reason:
        return ["", result.model, *["", "no", "no", "", "no", "", "no"], result.reason]
    return [
        result.architecture,
        result.model,
        str(result.heads),
        _yes(result.identical),
        _yes(result.generates),
        str(result.pruned),
        _yes(result.pruned_generates),
        f"{result.unchanged} of {result.new_tokens}",
        _yes(result.restored),
        "",
    ]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    run_program(structure, "python -m pliant.structure")
