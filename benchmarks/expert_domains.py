"""Experts of four domains on nano-l: questions in words that it was not trained on.

    python -m benchmarks.expert_domains --work FOLDER [--seeds 3] [--steps 60]

nano-l can add, compare, continue and count, and these questions are asked in other words than
those of its training: on its own kinds of question there is nothing left that an expert could
unlock.
`trained`: an expert for each domain, by reward, beside LoRA of rank 16 with the same rollouts and
an expert on the right answers; `elsewhere` is the change on nano-l's own kinds. `unseen`: further
words for the same, and kinds of question that are new to nano-l, by each strategy.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from string import ascii_lowercase

import torch

from benchmarks.expert_quality import Bench, World, trained, unseen
from benchmarks.harness import keep
from pliant import nano
from pliant.data import Row

TRAINED = {"plus": "a sum", "biggest": "a comparison", "continue": "a row", "number": "letters"}
UNSEEN = ("sum", "greatest", "follows", "smallest")
ROWS, ASKED, OTHERS = 300, 150, 600
COMMAND = "python -m benchmarks.expert_domains --work FOLDER"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    others = [Row(prompt=q.prompt, answer=q.answer) for q in nano.questions("test", OTHERS)]
    world = World(
        trained=TRAINED,
        unseen=UNSEEN,
        questions=questions,
        is_right=lambda row, text: float(text.strip() == row["answer"]),
        others=others,
        rows=ROWS,
        asked=ASKED,
        new=8,
    )
    bench = Bench(
        world, "nano-l", options.work, steps=options.steps, lora_rate=2e-3, parts="attention"
    )
    methods = dict.fromkeys(("expert", "lora", "expert, supervised"), options.seeds)
    figures = {
        "steps": options.steps,
        "trained": trained(bench, dict.fromkeys(TRAINED, methods), few_shot=False),
        "unseen": {str(seed): unseen(bench, seed) for seed in range(options.seeds)},
    }
    keep("expert_domains", figures, COMMAND)


def questions(family: str, count: int, split: str) -> list[Row]:
    """Different ones; no question of the test is in another split."""
    test = (
        set[str]() if split == "test" else {r["prompt"] for r in questions(family, ASKED, "test")}
    )
    draw, rows = random.Random(f"{family} {split}"), dict[str, Row]()
    while len(rows) < count:
        row = question(family, draw)
        if row["prompt"] not in test:
            rows[row["prompt"]] = row
    return list(rows.values())


def question(family: str, draw: random.Random) -> Row:
    numbers = [draw.randint(10, 99) for _ in range(draw.randint(3, 4))]
    shown = " ".join(map(str, numbers))
    first, step = draw.randint(2, 99), draw.randint(2, 12)
    row = " ".join(str(first + i * step) for i in range(4))
    letters = draw.sample(ascii_lowercase, 3)
    word, letter = "".join(draw.choices(letters, k=draw.randint(3, 6))), draw.choice(letters)
    a, b = numbers[:2]
    texts: dict[str, tuple[str, object]] = {
        "plus": (f"{a} plus {b}", a + b),
        "sum": (f"sum of {a} and {b}", a + b),
        "biggest": (f"biggest of {shown}", max(numbers)),
        "greatest": (f"greatest: {shown}", max(numbers)),
        "smallest": (f"min of {shown}", min(numbers)),
        "continue": (f"continue {row}", first + 4 * step),
        "follows": (f"what follows {row}", first + 4 * step),
        "number": (f"number of {letter} in {word}", word.count(letter)),
    }
    prompt, answer = texts[family]
    return Row(prompt=prompt, answer=str(answer))


if __name__ == "__main__":
    main()
