"""Experts trained by reward on a real model: what a short text says about somebody.

    python -m benchmarks.expert_facts --work FOLDER --others bbh.jsonl.gz [--seeds 2] [--steps 30]

Each question has sentences about three people, and asks for a fact of one: "... Where does Oscar
live?". The reward is 1 for an answer with the right fact and neither of the two others, else 0.
`trained`: an expert for each of two families, beside LoRA of rank 16 with the same rollouts, and
the base with three solved examples in its prompt; and what each does to other tasks (--others: rows
with prompt, answer and group, of which three groups are asked). `unseen`: two families that no
expert was trained on, by each strategy, beside the base, each expert and their average.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch

from benchmarks.expert_quality import Bench, World, trained, unseen
from benchmarks.harness import keep
from pliant.data import Row, read_rows
from pliant.experts.adapting import FewShotConfig

COMMAND = "python -m benchmarks.expert_facts --work FOLDER --others bbh.jsonl.gz"
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack")
ITEMS = ("cup", "hat", "bag", "book", "coat", "scarf", "kite", "bike", "pen", "ball", "lamp")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink", "grey", "purple")
CITIES = ("Paris", "London", "Rome", "Berlin", "Madrid", "Vienna", "Oslo", "Dublin", "Athens")
JOBS = ("teacher", "doctor", "farmer", "baker", "pilot", "nurse", "lawyer", "painter", "singer")
PEOPLE = 3
TRAINED = {"city": "a place", "colour": "a colour"}
UNSEEN = ("job", "owner")
OTHER_GROUPS = ("boolean_expressions", "navigate", "hyperbaton")
ROWS, ASKED, OTHERS = 600, 150, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--others", required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = World(
        trained=TRAINED,
        unseen=UNSEEN,
        questions=questions,
        is_right=is_right,
        others=other_questions(options.others),
        rows=ROWS,
        asked=ASKED,
        new=12,
        search=FewShotConfig(population=12, iterations=6, warm_start=6),
    )
    bench = Bench(world, options.model, options.work, options.dtype, options.steps)
    first, *more = TRAINED
    plan = {first: {"expert": options.seeds, "lora": 1}}
    plan |= {family: {"expert": 1} for family in more}
    figures = {
        "steps": options.steps,
        "trained": trained(bench, plan, few_shot=True),
        "unseen": unseen(bench),
    }
    keep(f"expert_facts_{Path(options.model).name}", figures, COMMAND)


def question(family: str, draw: random.Random) -> Row:
    """Three sentences and a question about one of them; `wrong` has the two other facts."""
    people, item = draw.sample(NAMES, PEOPLE), draw.choice(ITEMS)
    colours, cities = draw.sample(COLOURS, PEOPLE), draw.sample(CITIES, PEOPLE)
    jobs, ages = draw.sample(JOBS, PEOPLE), list(map(str, draw.sample(range(11, 80), PEOPLE)))
    asked = draw.randrange(PEOPLE)
    person, colour = people[asked], colours[asked]
    has = [f"{p} has a {c} {item}." for p, c in zip(people, colours, strict=True)]
    lives = [
        f"{p} is a {j} and lives in {c}." for p, j, c in zip(people, jobs, cities, strict=True)
    ]
    counts = [f"{p} is {a} years old." for p, a in zip(people, ages, strict=True)]
    texts, ending, facts = {
        "colour": (has, f"What colour is {person}'s {item}? Answer with one word.", colours),
        "owner": (has, f"Who has the {colour} {item}? Answer with one word.", people),
        "city": (lives, f"Where does {person} live? Answer with one word.", cities),
        "job": (lives, f"What is the job of {person}? Answer with one word.", jobs),
        "age": (counts, f"How old is {person}? Answer with the number only.", ages),
    }[family]
    wrong = [fact for fact in facts if fact != facts[asked]]
    return Row(prompt=f"{' '.join(texts)} {ending}", answer=facts[asked], wrong=wrong)


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


def is_right(row: Row, text: str) -> float:
    return float(row["answer"] in text and not any(fact in text for fact in row.get("wrong", ())))


def other_questions(source: str) -> list[Row]:
    groups: dict[str, list[Row]] = {name: [] for name in OTHER_GROUPS}
    for row in read_rows(source, ("prompt", "answer", "group")):
        groups.get(str(row["group"]), []).append(row)
    return [row for rows in groups.values() for row in rows[:OTHERS]]


if __name__ == "__main__":
    main()
