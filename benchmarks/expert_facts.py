"""Experts trained by reward on a real model: what a short text says about somebody.

    python -m benchmarks.expert_facts --work FOLDER --others bbh.jsonl.gz [--seeds 2] [--steps 40]

Each question has sentences about three people, and asks for a fact of one: "... Where does Oscar
live?". The reward is 1 for an answer with the right fact and neither of the two others, else 0.
`trained`: an expert for each of three families, beside LoRA of rank 16 with the same rollouts, and
the base with three solved examples in its prompt; and what each does to other tasks (--others: rows
with prompt, answer and group, of which three groups are asked). `unseen`: two families that no
expert was trained on, by each strategy, beside the base, each expert and their average. Runs are
kept in --work and are not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from rich.console import Console

from benchmarks.facts import is_right, questions, reward
from benchmarks.harness import keep
from pliant.data import Row, read_rows
from pliant.experts.adapting import ByClassifier, ByPrompt, FewShot, Shot
from pliant.experts.adapting.folders import load_experts
from pliant.experts.adapting.prompts import generate
from pliant.experts.adapting.strategy import name_of
from pliant.experts.rows import Mixture
from pliant.experts.training import ExpertTrainingConfig
from pliant.experts.training.answers import greedy_answers
from pliant.experts.training.run import train_expert
from pliant.experts.training.task import encode
from pliant.loading import load
from pliant.reports.tables import Table
from pliant.stats import Band, paired

TRAINED, UNSEEN = ("city", "colour", "age"), ("job", "owner")
LABELS = {"city": "a place", "colour": "a colour", "age": "an age"}
OTHER_GROUPS = ("boolean_expressions", "navigate", "hyperbaton")
TRAIN, TEST, OTHERS, SHOTS, EXAMPLES = 600, 150, 100, 10, 3
NEW = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--others", required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--parts", default="attention")
    parser.add_argument("--lora-rate", type=float, default=5e-4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options)
    figures = {"trained": trained(bench), "unseen": unseen(bench)}
    keep(f"expert_facts_{Path(options.model).name}", figures, "python -m benchmarks.expert_facts")


@dataclass
class Bench:
    """The base, its tokenizer, and what was asked so far."""

    options: argparse.Namespace
    base: Any = field(init=False)
    tokenizer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.base, self.tokenizer = load(self.options.model, dtype=self.options.dtype)
        self.base.eval()
        groups: dict[str, list[Row]] = {name: [] for name in OTHER_GROUPS}
        for row in read_rows(self.options.others, ("prompt", "answer", "group")):
            groups.get(str(row["group"]), []).append(row)
        self.others = [row for rows in groups.values() for row in rows[:OTHERS]]
        self.test = {name: questions(name, TEST, "test") for name in (*TRAINED, *UNSEEN)}

    def right(self, model: Any, rows: Sequence[Row], key: str) -> list[float]:
        """Which greedy answers are right; kept under `key`."""

        def ask() -> list[float]:
            ids = encode([{"prompt": row["prompt"]} for row in rows], self.tokenizer).ids
            answers = greedy_answers(model, ids, NEW, self.tokenizer)
            texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
            return [right_of(row, text) for row, text in zip(rows, texts, strict=True)]

        return self.kept(key, ask)

    def kept(self, key: str, compute: Callable[[], Any]) -> Any:
        path = self.options.work / f"{key}.json"
        if not path.is_file():
            result = compute()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result))
        return json.loads(path.read_text())

    def train(self, family: str, method: str, seed: int) -> dict[str, Any]:
        """Train once; the folder and what it came to."""
        folder = self.options.work / f"{family}-{method}-{seed}"

        def run() -> dict[str, Any]:
            lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
            is_lora = method == "lora"
            rate = {"learning_rate": self.options.lora_rate} if is_lora else {}
            config = ExpertTrainingConfig(
                steps=self.options.steps,
                parts=self.options.parts,
                max_new_tokens=NEW,
                seed=seed,
                **rate,
            )
            test = self.test[family]
            rows = questions(family, TRAIN, f"train {seed}", test)
            began = time.process_time()
            result = train_expert(
                self.base,
                self.tokenizer,
                rows,
                reward,
                config,
                folder=folder,
                held_out=test[:2],  # all of them are asked below
                peft_config=lora if is_lora else None,
                resume=folder.exists(),
            )
            return {
                "seconds": time.process_time() - began,
                "numbers": result.trained,
                "kl": result.kl,
                "learning rate": config.learning_rate,
            }

        return {"folder": str(folder), **self.kept(f"{folder.name}.run", run)}


def right_of(row: Row, text: str) -> float:
    return is_right(text, str(row["answer"]), row.get("wrong", ()))


# --- the trained families ------------------------------------------------------------------------


def trained(bench: Bench) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    others = bench.right(bench.base, bench.others, "others-base")
    for family in TRAINED:
        test = bench.test[family]
        base = bench.right(bench.base, test, f"{family}-base")
        few = bench.right(bench.base, with_examples(family, test), f"{family}-few-shot")
        figures[family] = {"base": mean(base), "few-shot prompt": gain(few, base)}
        first = family == TRAINED[0]
        for method in ("expert", "lora") if first else ("expert",):
            for seed in range(bench.options.seeds if first else 1):
                run = bench.train(family, method, seed)
                name = f"{method}, seed {seed}"
                model = PeftModel.from_pretrained(bench.base, run.pop("folder")).eval()
                right = bench.right(model, test, f"{family}-{name}")
                elsewhere = bench.right(model, bench.others, f"others-{family}-{name}")
                model.unload()
                figures[family][name] = {
                    **gain(right, base),
                    "elsewhere": gain(elsewhere, others),
                    **run,
                }
    table("the families that experts were trained on", figures)
    return figures


def with_examples(family: str, rows: Sequence[Row]) -> list[Row]:
    """The same questions behind three solved ones."""
    solved = [
        message
        for example in questions(family, EXAMPLES, "examples", rows)
        for message in (
            {"role": "user", "content": example["prompt"]},
            {"role": "assistant", "content": example["answer"]},
        )
    ]
    asked = [[*solved, {"role": "user", "content": row["prompt"]}] for row in rows]
    return [Row({**row, "prompt": prompt}) for row, prompt in zip(rows, asked, strict=True)]


# --- families that no expert was trained on ------------------------------------------------------


def unseen(bench: Bench) -> dict[str, Any]:
    folders = [bench.train(family, "expert", 0)["folder"] for family in TRAINED]
    model = load_experts(bench.base, folders)
    names = dict(zip(TRAINED, model.peft_config, strict=True))
    known = [(row["prompt"], names[f]) for f in TRAINED for row in questions(f, 60, "labels")]
    none = [(row["prompt"], "base") for row in bench.others[::5]]
    prompts, labels = zip(*known, *none, strict=True)
    by_classifier = ByClassifier.fit(model, bench.tokenizer, list(prompts), list(labels))
    by_prompt = ByPrompt(model, bench.tokenizer, {names[f]: LABELS[f] for f in TRAINED})
    adapt: dict[str, Adapt] = {
        **{name: partial(always, {name: 1.0}) for name in names.values()},
        "average": partial(always, {name: 1 / len(names) for name in names.values()}),
        "by prompt": lambda family, prompts: by_prompt.adapt(prompts),
        "by classifier": lambda family, prompts: by_classifier.adapt(prompts),
        "few-shot mixture": partial(few_shot, bench, model),
    }
    figures = {family: unseen_family(bench, model, family, adapt) for family in UNSEEN}
    model.unload()
    table("families that no expert was trained on", figures)
    return figures


Adapt = Callable[[str, Sequence[str]], list[Mixture]]


def always(mixture: Mixture, family: str, prompts: Sequence[str]) -> list[Mixture]:
    return [mixture] * len(prompts)


def few_shot(bench: Bench, model: Any, family: str, prompts: Sequence[str]) -> list[Mixture]:
    rows = questions(family, SHOTS, "shots", bench.test[family])
    shots = [Shot(row["prompt"], row["answer"]) for row in rows]
    return FewShot.fit(model, bench.tokenizer, shots, test=prompts).adapt(prompts)


def unseen_family(bench: Bench, model: Any, family: str, adapt: dict[str, Adapt]) -> dict[str, Any]:
    test = bench.test[family]
    texts = [row["prompt"] for row in test]
    base = bench.right(bench.base, test, f"{family}-base")

    def ask(choose: Adapt) -> dict[str, Any]:
        chosen = choose(family, texts)
        answers = generate(model, bench.tokenizer, texts, chosen, batch_size=32, max_new_tokens=NEW)
        right = [right_of(row, text) for row, text in zip(test, answers, strict=True)]
        picked = Counter(name_of(mixture) for mixture in chosen)
        return {"right": right, "picked": dict(picked.most_common(4))}

    figures: dict[str, Any] = {"base": mean(base)}
    for name, choose in adapt.items():
        kept = bench.kept(f"{family}-{name}", partial(ask, choose))
        figures[name] = {**gain(kept["right"], base), "picked": kept["picked"]}
    return figures


# --- figures -------------------------------------------------------------------------------------


def mean(right: Sequence[float]) -> float:
    return float(np.mean(right))


def gain(right: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    after, before = np.asarray(right), np.asarray(base)
    band: Band = paired(
        lambda rows: float(after[rows].mean()), lambda rows: float(before[rows].mean()), len(after)
    )
    return {"right": mean(right), "gain": [band.value, band.low, band.high]}


def table(title: str, figures: dict[str, Any]) -> None:
    rows = []
    for family, ways in figures.items():
        for way, own in ways.items():
            if not isinstance(own, dict):
                rows.append([family, way, f"{own:.3f}", "", ""])
                continue
            bands = [own["gain"], own["elsewhere"]["gain"] if "elsewhere" in own else None]
            cells = [f"{b[0]:+.3f} [{b[1]:+.3f}, {b[2]:+.3f}]" if b else "" for b in bands]
            rows.append([family, way, f"{own['right']:.3f}", *cells])
    Table(title, ("family", "way", "right", "gain", "elsewhere"), rows).draw(Console(width=120))


if __name__ == "__main__":
    main()
