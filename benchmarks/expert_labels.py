"""How well does a small real model classify questions by the probability of labels?

    python -m benchmarks.expert_labels --data FOLDER [--model smollm2-135m]

FOLDER holds `text/gsm8k-test.jsonl.gz`, `tasks/humaneval.jsonl.gz` and `tasks/bbh.jsonl.gz`. Four
kinds of question have an expert; a fifth has none and should go to the base. Each is asked with and
without a list of the labels before it, and with and without calibration. The experts are
placeholders of one number each, and are off while the model classifies. A question is the beginning
of a row; none was used to choose the wording of the labels.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import keep
from benchmarks.random_experts import with_random_experts
from pliant.data import read_rows
from pliant.experts.adapting import ByPrompt, PromptConfig
from pliant.loading import load

LABELS = {"math": "math", "code": "code", "words": "words", "dates": "dates"}
INSTRUCTION = "Which of these topics fits the question best?\n{labels}\n\nQuestion:"
ASKED = {
    "short": PromptConfig().sentence,
    "with the labels": "The best topic is",
}
LETTERS = 260
"""How much of each question is asked, from its beginning."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--each", type=int, default=10, help="questions of each kind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    asked = questions(options.data, options.each)
    model, tokenizer = with_placeholders(options.model)
    figures = {}
    for name, sentence in ASKED.items():
        instruction = INSTRUCTION if name == "with the labels" else None
        for calibrate in (False, True):
            config = PromptConfig(sentence=sentence, instruction=instruction, calibrate=calibrate)
            strategy = ByPrompt(model, tokenizer, LABELS, config)
            figures[f"{name}, {'calibrated' if calibrate else 'raw'}"] = shares(strategy, asked)
    Console().print(table(figures, options))
    command = f"python -m benchmarks.expert_labels --data FOLDER --model {options.model}"
    keep("expert_labels", {"model": options.model, "each": options.each, **figures}, command)


def shares(strategy: ByPrompt, asked: Sequence[tuple[str, str]]) -> dict[str, float]:
    """The share of each kind that goes where it should."""
    right: dict[str, list[bool]] = {}
    choices = strategy.choose([text for text, _ in asked])
    for choice, (_, kind) in zip(choices, asked, strict=True):
        right.setdefault(kind, []).append(choice.name == kind)
    by_kind = {kind: sum(each) / len(each) for kind, each in right.items()}
    seen = [hit for kind, each in right.items() if kind != "base" for hit in each]
    return {**by_kind, "all with an expert": sum(seen) / len(seen)}


def questions(folder: Path, each: int) -> list[tuple[str, str]]:
    tasks = read_rows(folder / "tasks/bbh.jsonl.gz", ("prompt", "group"))
    kinds: dict[str, list[Any]] = {
        "math": [r["question"] for r in read_rows(folder / "text/gsm8k-test.jsonl.gz", limit=each)],
        "code": [r["prompt"] for r in read_rows(folder / "tasks/humaneval.jsonl.gz", limit=each)],
        "words": [r["prompt"] for r in tasks if r["group"] == "word_sorting"],
        "dates": [r["prompt"] for r in tasks if r["group"] == "date_understanding"],
        "base": [
            text
            for pair in zip(
                *([r["prompt"] for r in tasks if r["group"] == group] for group in OTHERS),
                strict=True,
            )
            for text in pair
        ],
    }
    return [(text[:LETTERS], kind) for kind, texts in kinds.items() for text in texts[:each]]


OTHERS = ("sports_understanding", "movie_recommendation")
"""Tasks that no label fits."""


def with_placeholders(name: str) -> tuple[Any, Any]:
    base, tokenizer = load(name, dtype="bfloat16")
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "layers_to_transform": [0], "rank": 1}
    return with_random_experts(base, list(LABELS), 0.0, **settings), tokenizer


def table(figures: dict[str, Any], options: Any) -> Table:
    kinds = list(next(iter(figures.values())))
    rows = Table(
        "asked", *kinds, title=f"Classified right, {options.model}, {options.each} of each"
    )
    for name, figure in figures.items():
        rows.add_row(name, *(f"{figure[kind]:.2f}" for kind in kinds))
    return rows


if __name__ == "__main__":
    main()
