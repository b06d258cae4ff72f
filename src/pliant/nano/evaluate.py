"""How often the embedded models are right: `python -m pliant.nano.evaluate`.

Asks each model the same test questions with plain `generate`, and prints its accuracy by family
and difficulty. `--write` puts the figures on the card beside the weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pliant.loading import WEIGHTS, load
from pliant.nano import HELD_OUT, NAMES, TRAINED, ask, path
from pliant.nano.program import Parser, as_program, progress
from pliant.nano.question import DIFFICULTIES, Question
from pliant.nano.world import questions

TEST_QUESTIONS, HELD_OUT_QUESTIONS = 6_000, 600
_AT_ONCE = 600


@dataclass(frozen=True)
class Accuracy:
    """Which of the questions one model got right."""

    asked: tuple[Question, ...]
    right: tuple[bool, ...]

    def share(
        self, family: str | None = None, difficulty: int | None = None, domain: str | None = None
    ) -> float | None:
        """The share that was right, of the whole or of a part; None where nothing was asked."""
        hits = [
            hit
            for q, hit in zip(self.asked, self.right, strict=True)
            if family in (None, q.family)
            and difficulty in (None, q.difficulty)
            and domain in (None, q.domain)
        ]
        return sum(hits) / len(hits) if hits else None

    def parted(self, n: int) -> tuple[Accuracy, Accuracy]:
        """The first `n` questions, and the rest."""
        return Accuracy(self.asked[:n], self.right[:n]), Accuracy(self.asked[n:], self.right[n:])


def measure(
    name: str, asked: Sequence[Question], folder: Path = WEIGHTS, device: str | None = None
) -> Accuracy:
    """Ask a model of `folder` every question."""
    model, tokenizer = load(folder / name, device=device)
    right: list[bool] = []
    with progress(name, len(asked)) as tell:
        for begin in range(0, len(asked), _AT_ONCE):
            some = asked[begin : begin + _AT_ONCE]
            said = ask(model, tokenizer, [q.prompt for q in some])
            right += [q.check(text) for q, text in zip(some, said, strict=True)]
            tell(len(right), f"questions, {sum(right) / len(right):.3f} right")
    return Accuracy(tuple(asked), tuple(right))


def card_questions(seed: int = 0) -> tuple[list[Question], list[Question]]:
    """The questions of the card: those of the trained families, and the held-out ones apart."""
    unseen = [family.name for family in HELD_OUT]
    return (
        questions("test", TEST_QUESTIONS, seed),
        questions("test", HELD_OUT_QUESTIONS, seed, families=unseen),
    )


def table(trained: Accuracy, unseen: Accuracy) -> str:
    """Accuracy by family and difficulty, as the card has it."""
    lines = [
        "| domain | family | 1 | 2 | 3 | 4 | 5 | all |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for accuracy, families in ((trained, TRAINED), (unseen, HELD_OUT)):
        for domain in dict.fromkeys(family.domain for family in families):
            for family in (f for f in families if f.domain == domain):
                cells = [accuracy.share(family.name, d) for d in (*DIFFICULTIES, None)]
                lines.append(_row(domain, family.name, cells))
            whole = [accuracy.share(domain=domain, difficulty=d) for d in (*DIFFICULTIES, None)]
            lines.append(_row(f"**{domain}**", "", whole))
    overall = [trained.share(difficulty=d) for d in (*DIFFICULTIES, None)]
    lines.append(_row("**all trained**", "", overall))
    return "\n".join(lines)


def _row(domain: str, family: str, shares: Sequence[float | None]) -> str:
    cells = ["" if share is None else f"{share:.2f}" for share in shares]
    return f"| {domain} | {family} | " + " | ".join(cells) + " |"


def card(name: str, parameters: int, trained: Accuracy, unseen: Accuracy) -> str:
    n, m = len(trained.asked), len(unseen.asked)
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
    _replace(folder / name / "README.md", card(name, parameters, trained, unseen))
    figures = {
        "questions": len(trained.asked),
        "accuracy": trained.share(),
        "by_difficulty": {d: trained.share(difficulty=d) for d in DIFFICULTIES},
        "by_domain": {d: trained.share(domain=d) for d in dict.fromkeys(f.domain for f in TRAINED)},
        "by_family": {f.name: trained.share(f.name) for f in TRAINED},
        "held_out": {f.name: unseen.share(f.name) for f in HELD_OUT},
    }
    _replace(folder / name / "accuracy.json", json.dumps(figures, indent=2) + "\n")


def _replace(file: Path, text: str) -> None:
    aside = file.with_name(file.name + ".writing")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    with as_program("no card was touched that is not whole"):
        for name in options.models:
            path(name)  # a name that is none is said before any model is asked
        evaluate([n for n in NAMES if n in (options.models or NAMES)], options)


def evaluate(names: Sequence[str], options: argparse.Namespace) -> None:
    asked, asked_unseen = card_questions(options.seed)
    right: dict[str, tuple[bool, ...]] = {}
    for name in names:
        both = measure(name, [*asked, *asked_unseen], options.weights, options.device)
        trained, unseen = both.parted(len(asked))
        right[name] = trained.right
        print(f"{name}: {trained.share():.4f} of {len(asked):,}\n\n{table(trained, unseen)}\n")
        if options.write:
            write(name, trained, unseen, options.weights)
    if len(right) == len(NAMES):
        print(_together(*right.values()))


def _together(small: Sequence[bool], large: Sequence[bool]) -> str:
    pairs = list(zip(small, large, strict=True))
    only_small = sum(s and not le for s, le in pairs) / len(pairs)
    only_large = sum(le and not s for s, le in pairs) / len(pairs)
    return f"only {NAMES[0]} right: {only_small:.4f}; only {NAMES[1]} right: {only_large:.4f}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m pliant.nano.evaluate",
        description="Accuracy of the embedded models by family and difficulty.",
        epilog="example: python -m pliant.nano.evaluate nano-s",
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="nano-s or nano-l (default: both)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another set of test questions")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the models are")
    parser.add_argument("--device", help="cpu, cuda, ... (as a rule cpu)")
    parser.add_argument("--write", action="store_true", help="write the cards beside the weights")
    return parser


if __name__ == "__main__":
    main()
