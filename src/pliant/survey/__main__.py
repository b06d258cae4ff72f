"""`python -m pliant.survey docs/architectures.md`: measure every architecture, write the page."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import transformers

from pliant.anatomy.tiny import causal_lm_types, variants
from pliant.cli.app import run_program
from pliant.files import write_file
from pliant.options import Flag
from pliant.survey.capability import Specimen, Verdict, ask, by_part

PREAMBLE = """\
# Architectures

What Pliant can do with each type of causal language model, measured by `make architectures` with
transformers {transformers} and torch {torch}. Each type is built small, with random weights and
the structure of its default config, and every question below is answered by running it, never by
reading code. `pliant doctor MODEL` answers the same questions for one model's own config.

Of {types} types, **{runs} build and run**; Pliant knows the layers of **{layers}** and the output
projections of attention in **{attention}**. Rows with a `+` are further structures of a type, and
do not count. The number after a cross is its reason, the number after a tick a condition; both are
listed at the end.
"""


@dataclass(frozen=True)
class Row:
    """One architecture and its answers, by capability."""

    name: str
    answers: Mapping[str, Verdict]

    @property
    def is_variant(self) -> bool:
        return "+" in self.name


@dataclass(frozen=True)
class SurveyOptions:
    page: Annotated[Path, Flag(positional=True)]
    """The Markdown file to write."""


def survey(options: SurveyOptions) -> None:
    """Measure every architecture and write the page.

    Example: python -m pliant.survey docs/architectures.md
    """
    write(options.page, page(list(rows())))


def rows() -> Iterator[Row]:
    """Ask every question about every type and variant, and print the number of yeses to stderr."""
    for name in sorted([*causal_lm_types(), *variants()]):
        answers = ask(Specimen(name))
        yes = sum(answer.ok for answer in answers.values())
        print(f"{name}: {yes} of {len(answers)}", file=sys.stderr)
        yield Row(name, answers)


def write(path: Path, text: str) -> None:
    """Write the text, completely or not at all, in a folder that need not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.encode())


def page(table: list[Row]) -> str:
    """The rows as Markdown: totals, questions, the table, and every reason once."""
    reasons = _numbered(table)
    preamble = PREAMBLE.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        types=sum(not row.is_variant for row in table),
        **{name: count(table, name) for name in ("runs", "layers", "attention")},
    )
    notes = [f"{number}. {_escaped(reason)}" for reason, number in reasons.items()]
    tables = [*_questions(table), "", *_table(table, reasons)]
    return "\n".join([preamble, *tables, "", "## Reasons", "", *notes, ""])


def count(table: list[Row], capability: str) -> int:
    """How many types have it, without variants."""
    return sum(row.answers[capability].ok for row in table if not row.is_variant)


def _questions(table: list[Row]) -> list[str]:
    lines = ["| part | column | question | exactly | yes |", "|---|---|---|---|--:|"]
    for c in by_part():
        yes = count(table, c.name)
        lines.append(f"| {c.part} | {c.name} | {c.question} | {c.exactly} | {yes} |")
    return lines


def _table(table: list[Row], reasons: Mapping[str, int]) -> list[str]:
    names = [capability.name for capability in by_part()]
    head = ["| type | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    return head + [
        f"| {row.name} | " + " | ".join(_cell(row.answers[n], reasons) for n in names) + " |"
        for row in table
    ]


def _cell(verdict: Verdict, reasons: Mapping[str, int]) -> str:
    note = f" {reasons[verdict.reason]}" if verdict.reason else ""
    return ("✓" if verdict.ok else "✗") + note


def _numbered(table: list[Row]) -> dict[str, int]:
    """The reasons with their numbers, in the order of the table."""
    names = [capability.name for capability in by_part()]
    answers = (row.answers[name] for row in table for name in names)
    reasons = (answer.reason for answer in answers if answer.reason)
    return {reason: number for number, reason in enumerate(dict.fromkeys(reasons), start=1)}


def _escaped(reason: str) -> str:
    return reason.replace("|", "\\|").replace("<", "\\<")


if __name__ == "__main__":
    run_program(survey, "python -m pliant.survey")
