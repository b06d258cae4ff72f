"""The accuracy of the embedded models: `python -m pliant.nano.evaluate`.

Asks each model the same test questions with plain `generate`, and prints its accuracy by family
and difficulty. `--write` updates the cards beside the weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pliant.cli import terminal
from pliant.cli.app import run_program
from pliant.files import write_file
from pliant.loading import WEIGHTS, load
from pliant.nano import HELD_OUT, NAMES, TRAINED, ask, path
from pliant.nano.families import DIFFICULTIES, Question
from pliant.nano.world import questions
from pliant.options import Flag

TEST_QUESTIONS, HELD_OUT_QUESTIONS = 6_000, 600
_BATCH = 600


@dataclass(frozen=True)
class Accuracy:
    """Which questions a model got right."""

    questions: tuple[Question, ...]
    right: tuple[bool, ...]

    def share(
        self, family: str | None = None, difficulty: int | None = None, domain: str | None = None
    ) -> float | None:
        """The share of right answers, of all questions or a part; None for an empty part."""
        hits = [
            hit
            for q, hit in zip(self.questions, self.right, strict=True)
            if family in (None, q.family)
            and difficulty in (None, q.difficulty)
            and domain in (None, q.domain)
        ]
        return sum(hits) / len(hits) if hits else None

    def split(self, n: int) -> tuple[Accuracy, Accuracy]:
        """The first `n` questions, and the rest."""
        parts = (slice(n), slice(n, None))
        first, rest = (Accuracy(self.questions[part], self.right[part]) for part in parts)
        return first, rest


def measure(
    name: str,
    questions: Sequence[Question],
    folder: Path,
    device: str | None = None,
) -> Accuracy:
    """Ask a model of `folder` every question."""
    model, tokenizer = load(folder / name, device=device)
    right: list[bool] = []
    with terminal.progress(name, len(questions), 1) as report:
        for start in range(0, len(questions), _BATCH):
            batch = questions[start : start + _BATCH]
            texts = ask(model, tokenizer, [question.prompt for question in batch])
            right += [q.check(text) for q, text in zip(batch, texts, strict=True)]
            report(len(right), f"questions, {sum(right) / len(right):.3f} right")
    return Accuracy(tuple(questions), tuple(right))


def card_questions(seed: int = 0) -> tuple[list[Question], list[Question]]:
    """The card's questions: of the trained families, and of the held-out ones."""
    unseen = [family.name for family in HELD_OUT]
    trained = questions("test", TEST_QUESTIONS, seed)
    return trained, questions("test", HELD_OUT_QUESTIONS, seed, families=unseen)


def table(trained: Accuracy, unseen: Accuracy) -> str:
    """Accuracy by family and difficulty, as a Markdown table."""
    lines = ["| domain | family | 1 | 2 | 3 | 4 | 5 | all |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    for accuracy, families in ((trained, TRAINED), (unseen, HELD_OUT)):
        for domain in dict.fromkeys(family.domain for family in families):
            for family in (f for f in families if f.domain == domain):
                cells = [accuracy.share(family.name, d) for d in (*DIFFICULTIES, None)]
                lines.append(_row(domain, family.name, cells))
            shares = [accuracy.share(domain=domain, difficulty=d) for d in (*DIFFICULTIES, None)]
            lines.append(_row(f"**{domain}**", "", shares))
    overall = [trained.share(difficulty=d) for d in (*DIFFICULTIES, None)]
    lines.append(_row("**all trained**", "", overall))
    return "\n".join(lines)


def _row(domain: str, family: str, shares: Sequence[float | None]) -> str:
    cells = ["" if share is None else f"{share:.2f}" for share in shares]
    return f"| {domain} | {family} | " + " | ".join(cells) + " |"


def card(name: str, parameters: int, trained: Accuracy, unseen: Accuracy) -> str:
    n, m = len(trained.questions), len(unseen.questions)
    share = trained.share()
    assert share is not None
    return f"""---
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
---

# {name}

A stock Llama with {parameters:,} parameters on a byte tokenizer, trained from nothing on Pliant's
world of questions. It answers those questions and nothing else: it is for tests, demonstrations
and benchmarks of Pliant.

Accuracy on {n:,} test questions, greedy, exact match: **{share:.3f}**. The families of the domain
*unseen* ({m:,} questions, counted apart) were held out of training.

{table(trained, unseen)}

Columns are difficulties. Made by `python -m pliant.nano.train`; measured by
`python -m pliant.nano.evaluate --write`.
"""


def write(name: str, trained: Accuracy, unseen: Accuracy, folder: Path) -> None:
    """The card, for people; accuracy.json, for programs."""
    from safetensors import safe_open

    with safe_open(folder / name / "model.safetensors", "pt") as weights:
        parameters = sum(weights.get_tensor(key).numel() for key in weights.keys())  # noqa: SIM118
    write_file(folder / name / "README.md", card(name, parameters, trained, unseen).encode())
    figures = {
        "questions": len(trained.questions),
        "accuracy": trained.share(),
        "by_difficulty": {d: trained.share(difficulty=d) for d in DIFFICULTIES},
        "by_domain": {d: trained.share(domain=d) for d in dict.fromkeys(f.domain for f in TRAINED)},
        "by_family": {f.name: trained.share(f.name) for f in TRAINED},
        "held_out": {f.name: unseen.share(f.name) for f in HELD_OUT},
    }
    write_file(folder / name / "accuracy.json", f"{json.dumps(figures, indent=2)}\n".encode())


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    models: Annotated[tuple[str, ...], Flag(positional=True, metavar="MODEL")] = ()
    """nano-s or nano-l. Default: both."""
    seed: int = 0
    """Picks another set of test questions."""
    weights: Path = WEIGHTS
    """The folder of the models."""
    device: str | None = None
    """cpu, cuda, ... (cpu is usually fastest)."""
    write: bool = False
    """Write the cards beside the weights."""

    def __post_init__(self) -> None:
        for name in self.models:
            path(name)  # an unknown name is an error before any model runs


def evaluate(options: EvaluateOptions) -> None:
    """Measure the accuracy of the embedded models by family and difficulty.

    Example: python -m pliant.nano.evaluate nano-s
    """
    terminal.hide_loading_bars()
    try:
        _evaluate(options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("no card is half-written") from None


def _evaluate(options: EvaluateOptions) -> None:
    trained_questions, unseen_questions = card_questions(options.seed)
    right: dict[str, tuple[bool, ...]] = {}
    for name in (name for name in NAMES if name in (options.models or NAMES)):
        every = [*trained_questions, *unseen_questions]
        both = measure(name, every, options.weights, options.device)
        trained, unseen = both.split(len(trained_questions))
        right[name] = trained.right
        share = f"{trained.share():.4f} of {len(trained_questions):,}"
        print(f"{name}: {share}\n\n{table(trained, unseen)}\n")
        if options.write:
            write(name, trained, unseen, options.weights)
    if len(right) == len(NAMES):
        print(_overlap(*right.values()))


def _overlap(small: Sequence[bool], large: Sequence[bool]) -> str:
    pairs = list(zip(small, large, strict=True))
    only_small = sum(s and not le for s, le in pairs) / len(pairs)
    only_large = sum(le and not s for s, le in pairs) / len(pairs)
    return f"only {NAMES[0]} right: {only_small:.4f}; only {NAMES[1]} right: {only_large:.4f}"


def main(arguments: Sequence[str] | None = None) -> None:
    run_program(evaluate, "python -m pliant.nano.evaluate", arguments)


if __name__ == "__main__":
    main()
