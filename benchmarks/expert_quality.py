"""What experts are worth on a world of questions: trained families, and unseen ones by strategy.

`benchmarks/expert_facts.py` asks a real model, `benchmarks/expert_domains.py` nano-l. Runs and
answers are kept in a folder, so that a benchmark that was stopped goes on.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console

from pliant.data import Row
from pliant.data.collate import pad_rows
from pliant.experts import SVFConfig
from pliant.experts.adapting import ByClassifier, ByPrompt, FewShot, FewShotConfig, Shot
from pliant.experts.adapting.folders import load_experts
from pliant.experts.adapting.prompts import generate
from pliant.experts.adapting.strategy import name_of
from pliant.experts.rows import Mixture
from pliant.experts.training import ExpertTrainingConfig
from pliant.experts.training.answers import end_ids, greedy_answers
from pliant.experts.training.run import train_expert
from pliant.experts.training.task import encode
from pliant.loading import load
from pliant.reports.tables import Table
from pliant.stats import paired

SHOTS, EXAMPLES, LABELLED = 10, 3, 60
COLUMNS = ("answer", "wrong")
"""What may make an answer right."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Families of questions, and what makes an answer right."""

    trained: Mapping[str, str]
    """The families that experts are trained on, each with the label by which it is recognised."""
    unseen: tuple[str, ...]
    questions: Callable[[str, int, str], list[Row]]
    """So many of a family and a split ("test", "train 0", "shots"); no prompt is in two splits."""
    is_right: Callable[[Row, str], float]
    others: Sequence[Row]
    """Questions of other kinds, which no expert should change."""
    rows: int
    """Of a family, to train on."""
    asked: int
    """Of a family, to test on."""
    new: int
    """The longest answer."""
    search: FewShotConfig = FewShotConfig()
    """Of a mixture."""

    def reward(self, completions: Sequence[str], **columns: Any) -> list[float]:
        """As trl calls it, with each row's columns."""
        names = [name for name in COLUMNS if name in columns]
        values = zip(*(columns[name] for name in names), strict=True)
        rows = (Row(zip(names, row, strict=True)) for row in values)
        return [self.is_right(row, text) for row, text in zip(rows, completions, strict=True)]


@dataclass
class Bench:
    """The base of a world, and what was asked and trained so far."""

    world: World
    model: str
    work: Path
    dtype: str = "auto"
    steps: int = 60
    lora_rate: float = 5e-4
    parts: Any = "mlp"
    base: Any = field(init=False)
    tokenizer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.base, self.tokenizer = load(self.model, dtype=self.dtype)
        self.base.eval()
        families = (*self.world.trained, *self.world.unseen)
        self.test = {f: self.world.questions(f, self.world.asked, "test") for f in families}

    def kept(self, key: str, compute: Callable[[], Any]) -> Any:
        path = self.work / f"{key}.json"
        if not path.is_file():
            content = json.dumps(compute())
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return json.loads(path.read_text())

    def right(self, model: Any, rows: Sequence[Row], key: str) -> list[float]:
        """Which greedy answers are right."""

        def ask() -> list[float]:
            ids = encode([{"prompt": row["prompt"]} for row in rows], self.tokenizer).ids
            answers = greedy_answers(model, ids, self.world.new, self.tokenizer)
            texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
            return [self.world.is_right(row, text) for row, text in zip(rows, texts, strict=True)]

        return self.kept(key, ask)

    def train(self, family: str, method: str, seed: int) -> tuple[Path, dict[str, Any]]:
        """The folder of what was trained, and what it came to."""
        folder = self.work / f"{family}, {method}, {seed}"
        train = self.supervised if method.endswith("supervised") else self.by_reward
        return folder, self.kept(
            f"{folder.name}, run", partial(train, family, method, seed, folder)
        )

    def by_reward(self, family: str, method: str, seed: int, folder: Path) -> dict[str, Any]:
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        rate = {"learning_rate": self.lora_rate} if method == "lora" else {}
        config = ExpertTrainingConfig(
            steps=self.steps, max_new_tokens=self.world.new, seed=seed, parts=self.parts, **rate
        )
        began = time.process_time()
        result = train_expert(
            self.base,
            self.tokenizer,
            self.world.questions(family, self.world.rows, f"train {seed}"),
            self.world.reward,
            config,
            folder=folder,
            held_out=self.test[family][:2],  # all of them are asked elsewhere
            peft_config=lora if method == "lora" else None,
            resume=folder.exists(),
        )
        seconds = time.process_time() - began
        return {"seconds": seconds, "numbers": result.trained, "kl": result.kl}

    def supervised(self, family: str, method: str, seed: int, folder: Path) -> dict[str, Any]:
        """The same expert on the right answers: as many steps, of as many answers."""
        config = ExpertTrainingConfig().resolved(self.base.config.num_hidden_layers)
        rows = self.world.questions(family, self.world.rows, f"train {seed}")
        end = end_ids(self.base, self.tokenizer)[:1]
        prompts = encode(rows, self.tokenizer).ids
        answers = [self.tokenizer(str(row["answer"])).input_ids + end for row in rows]
        model = get_peft_model(self.base, SVFConfig(parts=self.parts))
        numbers = [p for p in model.parameters() if p.requires_grad]
        rate = config.learning_rate
        optimizer = torch.optim.Adam(numbers, lr=rate)
        draw = np.random.default_rng(seed)
        began = time.process_time()
        for step in range(self.steps):
            batch = draw.choice(len(rows), min(len(rows), config.prompts * config.group))
            optimizer.param_groups[0]["lr"] = rate * (1 - step / self.steps)
            ids, _ = pad_rows([prompts[i] + answers[i] for i in batch], 0)
            ignored = [[-100] * len(prompts[i]) + answers[i] for i in batch]
            model(input_ids=ids, labels=pad_rows(ignored, -100)[0]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.process_time() - began
        model.save_pretrained(folder)
        model.unload()
        self.base.requires_grad_(True).eval()
        return {"seconds": seconds, "numbers": sum(p.numel() for p in numbers)}


# --- the families that experts are trained on ----------------------------------------------------


def trained(bench: Bench, plan: Mapping[str, Mapping[str, int]], few_shot: bool) -> dict[str, Any]:
    """`plan` has the number of seeds of each method, for each family."""
    figures: dict[str, Any] = {}
    others = bench.right(bench.base, bench.world.others, "others, base")
    for family, methods in plan.items():
        test = bench.test[family]
        base = bench.right(bench.base, test, f"{family}, base")
        figures[family] = {"base": {"right": mean(base)}}
        if few_shot:
            asked = with_examples(bench, family)
            few = bench.right(bench.base, asked, f"{family}, examples")
            figures[family]["base, examples in the prompt"] = gain(few, base)
        for method, seeds in methods.items():
            for seed in range(seeds):
                folder, run = bench.train(family, method, seed)
                model = PeftModel.from_pretrained(bench.base, folder).eval()
                right = bench.right(model, test, f"{folder.name}, asked")
                elsewhere = bench.right(model, bench.world.others, f"{folder.name}, others")
                model.unload()
                own = {**gain(right, base), "elsewhere": gain(elsewhere, others), **run}
                figures[family][f"{method}, seed {seed}"] = own
    table("the families that experts were trained on", figures)
    return figures


def with_examples(bench: Bench, family: str) -> list[Row]:
    """The test's questions behind a few solved ones."""
    solved = [
        message
        for example in bench.world.questions(family, EXAMPLES, "examples")
        for message in (
            {"role": "user", "content": example["prompt"]},
            {"role": "assistant", "content": example["answer"]},
        )
    ]
    return [
        Row({**row, "prompt": [*solved, {"role": "user", "content": row["prompt"]}]})
        for row in bench.test[family]
    ]


# --- families that no expert was trained on ------------------------------------------------------

Adapt = Callable[[str, Sequence[str]], list[Mixture]]


def unseen(bench: Bench, seed: int = 0) -> dict[str, Any]:
    """Each strategy, beside the base, each expert alone and their average."""
    world = bench.world
    folders = [bench.train(family, "expert", seed)[0] for family in world.trained]
    for family in world.unseen:  # before the experts act in it
        bench.right(bench.base, bench.test[family], f"{family}, base")
    model = load_experts(bench.base, folders)
    names = dict(zip(world.trained, model.peft_config, strict=True))
    known = [
        (row["prompt"], names[family])
        for family in world.trained
        for row in world.questions(family, LABELLED, "labels")
    ]
    none = [(row["prompt"], "base") for row in world.others[::5]]
    prompts, labels = zip(*known, *none, strict=True)
    by_classifier = ByClassifier.fit(model, bench.tokenizer, list(prompts), list(labels))
    texts = {names[family]: label for family, label in world.trained.items()}
    by_prompt = ByPrompt(model, bench.tokenizer, texts)
    adapt: dict[str, Adapt] = {
        **{family: partial(always, {name: 1.0}) for family, name in names.items()},
        "average": partial(always, {name: 1 / len(names) for name in names.values()}),
        "by prompt": lambda family, prompts: by_prompt.adapt(prompts),
        "by classifier": lambda family, prompts: by_classifier.adapt(prompts),
        "few-shot mixture": partial(few_shot, bench, model),
    }
    figures = {f: _unseen_family(bench, model, f, adapt, seed) for f in world.unseen}
    model.unload()
    table("families that no expert was trained on", figures)
    return figures


def always(mixture: Mixture, family: str, prompts: Sequence[str]) -> list[Mixture]:
    return [mixture] * len(prompts)


def few_shot(bench: Bench, model: Any, family: str, prompts: Sequence[str]) -> list[Mixture]:
    rows = bench.world.questions(family, SHOTS, "shots")
    shots = [Shot(row["prompt"], row["answer"]) for row in rows]
    fitted = FewShot.fit(model, bench.tokenizer, shots, bench.world.search, test=prompts)
    return fitted.adapt(prompts)


def _unseen_family(
    bench: Bench, model: Any, family: str, adapt: Mapping[str, Adapt], seed: int
) -> dict[str, Any]:
    test = bench.test[family]
    texts = [row["prompt"] for row in test]
    base = bench.right(bench.base, test, f"{family}, base")

    def ask(choose: Adapt) -> dict[str, Any]:
        chosen = choose(family, texts)
        new = {"max_new_tokens": bench.world.new}
        answers = generate(model, bench.tokenizer, texts, chosen, batch_size=32, **new)
        right = [bench.world.is_right(row, text) for row, text in zip(test, answers, strict=True)]
        picked = Counter(name_of(mixture) for mixture in chosen)
        return {"right": right, "picked": dict(picked.most_common(4))}

    figures: dict[str, Any] = {"base": {"right": mean(base)}}
    for name, choose in adapt.items():
        kept = bench.kept(f"{family}, {name}, {seed}", partial(ask, choose))
        figures[name] = {**gain(kept["right"], base), "picked": kept["picked"]}
    return figures


# --- figures -------------------------------------------------------------------------------------


def mean(right: Sequence[float]) -> float:
    return float(np.mean(right))


def gain(right: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    after, before = np.asarray(right), np.asarray(base)
    band = paired(
        lambda rows: float(after[rows].mean()), lambda rows: float(before[rows].mean()), len(after)
    )
    return {"right": mean(right), "gain": [band.value, band.low, band.high]}


def table(title: str, figures: Mapping[str, Any]) -> None:
    rows = []
    for family, ways in figures.items():
        for way, own in ways.items():
            bands = [own.get("gain"), own["elsewhere"]["gain"] if "elsewhere" in own else None]
            cells = [f"{b[0]:+.3f} [{b[1]:+.3f}, {b[2]:+.3f}]" if b else "" for b in bands]
            rows.append([family, way, f"{own['right']:.3f}", *cells])
    Table(title, ("family", "way", "right", "gain", "elsewhere"), rows).draw(Console(width=120))
