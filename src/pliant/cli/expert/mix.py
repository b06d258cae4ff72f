"""`pliant expert mix`: the mixture of experts that suits a few solved examples, as an expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from annotated_types import Ge

from pliant.cli import terminal
from pliant.cli.expert.choosing import ExpertsOptions
from pliant.cli.shared_options import AnswerColumns
from pliant.errors import InvalidInput
from pliant.options import Flag

if TYPE_CHECKING:
    from pliant.experts.adapting import FewShot, Shot
    from pliant.stats import Band
    from pliant.verify import Verifier


@dataclass(frozen=True, kw_only=True)
class MixOptions(ExpertsOptions, AnswerColumns):
    data: str = ""
    """Solved examples: a file or data set with columns `prompt` and `answer`. Needed."""
    shots: Annotated[int, Ge(1)] | None = None
    """Draw so many as shots and test on the others. Default: all are shots."""
    test: str | None = None
    """A file to test on, instead; it may hold none of the shots. Default: none."""
    out: Annotated[Path | None, Flag(aliases=("-o",))] = None
    """The new folder of the mixed expert. Default: it is not written."""
    scope: Literal["global", "block", "layer"] = "global"
    """One coefficient for each expert, one for each block of layers, or one for each layer."""
    blocks: Annotated[int, Ge(1)] = 4
    """How many blocks, for --scope block."""
    reward: str | None = None
    """Search by the answers' mean reward: exact, numeric, contains, choice, .... Default: by
    the likelihood of the right answers."""
    population: Annotated[int, Ge(2)] = 32
    """Candidates in each round of the search."""
    iterations: Annotated[int, Ge(1)] = 12
    """Rounds."""
    l1: Annotated[float, Ge(0)] = 0.01
    """What a coefficient of 1 costs."""
    max_new_tokens: Annotated[int, Ge(1)] = 64
    """The longest answer, in tokens."""
    seed: int = 0
    """Of the drawn shots and of the search."""
    report: Path | None = None
    """Write a page with the coefficients, the search and the test (.html). Default: none."""


def mix(options: MixOptions) -> None:
    """Search the mixture of experts that suits a few solved examples; write it as one expert.

    Coefficients are of changes, so 0 everywhere is the base, and they may be negative or above 1.
    The shots are never part of the test.

    Example: pliant expert mix --experts my-experts --data task.jsonl --shots 10 --out mixed
    """
    from pliant.experts.adapting import FewShot, FewShotConfig, save_mixture

    verifier, shots, test = _checked(options)
    config = FewShotConfig(
        scope=options.scope,
        blocks=options.blocks,
        population=options.population,
        iterations=options.iterations,
        l1=options.l1,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
    )
    model, tokenizer = options.loaded()
    prompts = [each.prompt for each in test]
    reward = verifier if options.reward else None
    mixed = FewShot.fit(model, tokenizer, shots, config, test=prompts, reward=reward)
    scores = _tested(mixed, test, verifier, options.max_new_tokens) if test else {}
    if options.out is not None and mixed.mixture:
        save_mixture(model, mixed.mixture, options.out.expanduser())
    if options.report is not None:
        from pliant.cli.expert.mix_report import write_report

        write_report(options.report, mixed, scores, len(test), options.reward)
    _show(options, mixed, len(shots), scores, len(test))


def _checked(options: MixOptions) -> tuple[Verifier, list[Shot], list[Shot]]:
    """The verifier, the shots and the test, before any model is loaded."""
    from pliant.experts.adapting import check_split, shots_of, split_shots
    from pliant.files import check_new
    from pliant.reports.page import check_writable

    if not options.data:
        raise InvalidInput("there are no examples: give a file, --data FILE")
    if options.shots is not None and options.test is not None:
        raise InvalidInput("--shots draws the test from --data too: leave out --shots or --test")
    if options.out is not None:
        check_new(options.out.expanduser())
    if options.report is not None:
        check_writable(options.report)
    judge = _verifier(options.reward or "exact")
    rows = options.read(options.data, "answer")
    rest: list[dict[str, Any]] = []
    if options.shots is not None:
        rows, rest = split_shots(rows, options.shots, options.seed)
    if options.test is not None:
        rest = options.read(options.test, "answer")
    shots, test = shots_of(rows), shots_of(rest)
    check_split(shots, [each.prompt for each in test])
    return judge, shots, test


def _verifier(text: str) -> Verifier:
    """What `pliant expert train --reward` calls by this text."""
    from pliant.experts.reward_parts import parse_part
    from pliant.routing.judge import open_judge

    part = parse_part(text, open_judge)
    if not part.is_verifier:
        raise InvalidInput(f"--reward {text}: name one verifier: exact, numeric, contains, ...")
    return cast("Verifier", part.measure)


def _tested(
    mixed: FewShot, test: Sequence[Shot], verifier: Verifier, longest: int
) -> dict[str, Band]:
    """The share of right answers of the base, of each expert alone, and of the mixture."""
    import numpy as np

    from pliant.experts.adapting import generate
    from pliant.stats import bootstrap

    def share(right: Sequence[float]) -> Band:
        hits = np.asarray(right, dtype=float)
        return bootstrap(lambda rows: float(hits[rows].mean()), len(hits))

    ways: dict[str, Any] = {"base": {}, **{name: {name: 1.0} for name in mixed.experts}}
    ways["mixture"] = mixed.mixture
    scores = {}
    for name, mixture in ways.items():
        prompts = [each.prompt for each in test]
        answers = generate(
            mixed.model, mixed.tokenizer, prompts, [mixture] * len(test), max_new_tokens=longest
        )
        pairs = zip(answers, test, strict=True)
        scores[name] = share([verifier(text, each.answer) for text, each in pairs])
    return scores


def _show(
    options: MixOptions, mixed: FewShot, shots: int, scores: dict[str, Band], test: int
) -> None:
    from pliant.cli.expert.mix_report import scores_table
    from pliant.experts.adapting.strategy import name_of

    assert mixed.result is not None
    folder = str(options.out) if options.out is not None and mixed.mixture else None
    if options.json:
        content = {"mixture": mixed.mixture, "search": mixed.result.as_dict(), "folder": folder}
        terminal.print_json(
            {**content, "shots": shots, "test": {name: band.value for name, band in scores.items()}}
        )
        return
    tables = [scores_table(scores, test)] if scores else []
    end = f" Written to {folder}." if folder else ""
    if not mixed.mixture:
        end = " Nothing was written: no mixture is better than the base."
    terminal.draw(tables, [f"{name_of(mixed.mixture)}: {mixed.result}.{end}"])
