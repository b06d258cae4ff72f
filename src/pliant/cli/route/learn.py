"""`pliant route learn`: correct a router by the graded answers in its ledger."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pliant.cli import terminal
from pliant.cli.route import RouterOptions


@dataclass(frozen=True, kw_only=True)
class LearnOptions(RouterOptions):
    labels_out: Path | None = None
    """Also write the graded prompts as labels (.jsonl), to fit again with them and all others."""
    ledger: Path | None = None
    """Another file of the ledger than the router's own."""
    json: bool = False
    """Print one JSON document."""


def learn(options: LearnOptions) -> None:
    """Correct a router by the graded answers in its ledger, without fitting it again.

    Only explored prompts count, those that every model was asked, with a grade for each answer; 20
    are needed. Near them the router's predictions change, and elsewhere they stay as they are. If
    it is interrupted, the router is the old one.

    Example: pliant route learn --router my-router
    """
    from pliant.files import check_writable
    from pliant.routing import learning

    options.register_scorer()
    if options.labels_out is not None:
        check_writable(options.labels_out)
        labels = learning.labels(options.router, options.ledger)
        labels.write(options.labels_out)
    learned = learning.learn(options.router, options.ledger)
    if options.json:
        out = None if options.labels_out is None else str(options.labels_out)
        terminal.print_json({**learned.as_dict(), "labels": out})
        return
    terminal.print_text(str(learned))
    if options.labels_out is not None:
        terminal.print_text(f"{len(labels):,} labels in {options.labels_out}.")
