"""How many prompts go to the right expert, by labels and by a fitted head?

    python -m benchmarks.expert_classify [--seeds 3]

nano-l has an expert for each of four kinds of question, trained with right answers for a few steps;
a fifth kind has none, and belongs to the base. The ways to choose:

- labels: the base compares how probable the experts' labels are, as they come;
- labels, trained: the same with an expert that learned to write the label after the question,
  and a shorter sentence before it ("topic:");
- head: a linear head on the prompt's state, fitted on the prompts that this expert learned from.

All are asked the same held-out prompts. The kinds that no way was shown, trained or fitted, are
apart: for them the base is right, though some are close to a kind that has an expert ("smallest" to
"largest"). Bands are over the prompts of all seeds; a seed draws every prompt anew.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table

from benchmarks.harness import keep
from pliant import nano
from pliant.data.collate import IGNORED, Collator
from pliant.experts import SVFConfig
from pliant.experts.adapting import ByClassifier, ByPrompt, PromptConfig, Strategy
from pliant.experts.adapting.likelihood import answer_ids
from pliant.experts.adapting.prompts import encode
from pliant.stats import bootstrap

TARGET = 0.95
LABELS = {name: name for name in ("arithmetic", "words", "logic", "reading")}
"""One word each, with different first letters: one forward shows the probability of all."""
BASE, BASE_KIND = "base", "sequences"
CLASSIFIER = "classifier"
FAMILIES = {
    kind: [family.name for family in (*nano.TRAINED, *nano.HELD_OUT) if family.domain == kind]
    for kind in (*LABELS, BASE_KIND, "unseen")
}
ROWS, RATE = 16, 0.02  # of each step that an expert takes, and its learning rate


@dataclass(frozen=True)
class Asked:
    """Prompts of one kind, and what should answer them."""

    kind: str
    prompts: list[str]
    right: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano-l")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="that each expert is trained")
    parser.add_argument("--classifier-steps", type=int, default=150, help="of that for labels")
    parser.add_argument("--known", type=int, default=100, help="labelled prompts of each kind")
    parser.add_argument("--asked", type=int, default=60, help="held-out prompts of each kind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    hits: dict[str, dict[str, list[list[bool]]]] = {}
    for seed in range(options.seeds):
        ways = strategies(options, seed)
        for asked in questions("test", options.asked, seed):
            for name, strategy in ways.items():
                chosen = [choice.name for choice in strategy.choose(asked.prompts)]
                right = [name == asked.right for name in chosen]
                hits.setdefault(name, {}).setdefault(asked.kind, []).append(right)
    figures = {name: figures_of(kinds) for name, kinds in hits.items()}
    Console().print(table(figures, options))
    keep("expert_classify", {**vars(options), **figures}, "python -m benchmarks.expert_classify")


def figures_of(hits: Mapping[str, list[list[bool]]]) -> dict[str, Any]:
    """Shares that are right: of the kinds with an expert, of the one without, of those unseen."""
    groups = {
        "seen": list(LABELS),
        "the base's": [BASE_KIND],
        "unseen": ["unseen"],
        **{kind: [kind] for kind in LABELS},
    }
    return {name: share([hits[kind] for kind in kinds]) for name, kinds in groups.items()}


def share(hits: Sequence[list[list[bool]]]) -> dict[str, Any]:
    """With a band over the prompts, and the share of each seed."""
    seeds = [np.concatenate(rows).astype(float) for rows in zip(*hits, strict=True)]
    every = np.concatenate(seeds)
    band = bootstrap(lambda rows: float(every[rows].mean()), len(every))
    return {**band.as_dict(), "seeds": [float(own.mean()) for own in seeds]}


# --- questions and experts -----------------------------------------------------------------------


def questions(split: str, each: int, seed: int) -> list[Asked]:
    return [
        Asked(
            kind,
            [q.prompt for q in nano.questions(split, each, seed, families=families)],
            kind if kind in LABELS else BASE,
        )
        for kind, families in FAMILIES.items()
        if split == "test" or kind != "unseen"
    ]


def strategies(options: Any, seed: int) -> dict[str, Strategy]:
    """Every way to choose, on a model with freshly trained experts."""
    torch.manual_seed(seed)
    base, tokenizer = nano.load(options.model)
    first, *others = (*LABELS, CLASSIFIER)
    model = get_peft_model(base, SVFConfig(parts="mlp"), adapter_name=first)
    for name in others:
        model.add_adapter(name, SVFConfig(parts="all" if name == CLASSIFIER else "mlp"))
    for name in LABELS:
        solved = nano.questions("train", options.steps * ROWS, seed, families=FAMILIES[name])
        answers = answer_ids([q.answer for q in solved], tokenizer, ends=True)
        train(model, tokenizer, name, encode([q.prompt for q in solved], tokenizer), answers)
    known = questions("train", options.known, seed)
    prompts = [prompt for asked in known for prompt in asked.prompts]
    right = [asked.right for asked in known for _ in asked.prompts]
    asking = PromptConfig(expert=CLASSIFIER, calibrate=False, sentence="topic:", none="none")
    labels = ByPrompt(model, tokenizer, LABELS)
    trained = ByPrompt(model, tokenizer, LABELS, asking)
    learn_labels(model, trained, prompts, right, options.classifier_steps)
    model.requires_grad_(False).eval()
    head = ByClassifier.fit(model, tokenizer, prompts, right)
    return {"labels": labels, "labels, trained": trained, "head": head}


def learn_labels(
    model: Any, asking: ByPrompt, prompts: Sequence[str], right: Sequence[str], steps: int
) -> None:
    """The expert that classifies learns to write each question's label after the sentence."""
    own = dict(zip(asking.labels, asking.label_ids, strict=True))
    asked = [[*ids, *asking.suffix] for ids in encode(prompts, asking.tokenizer)]
    order = np.random.default_rng(0).permutation(len(asked) * (1 + steps * ROWS // len(asked)))
    rows = [int(i) % len(asked) for i in order[: steps * ROWS]]
    labels = [own[right[i]] for i in rows]
    train(model, asking.tokenizer, CLASSIFIER, [asked[i] for i in rows], labels)


def train(
    model: Any,
    tokenizer: Any,
    name: str,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> None:
    """One expert, on the tokens of the answers, each row once."""
    model.set_adapter(name)
    model.train()
    rows = [
        {"input_ids": [*p, *a], "labels": [IGNORED] * len(p) + list(a)}
        for p, a in zip(prompts, answers, strict=True)
    ]
    collate = Collator.of(tokenizer)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for start in range(0, len(rows), ROWS):
        loss = model(**collate(rows[start : start + ROWS])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def table(figures: Mapping[str, Any], options: Any) -> Table:
    kinds = list(next(iter(figures.values())))
    title = f"Went to the right expert, {options.model}, {options.seeds} seeds; seen >= {TARGET}"
    rows = Table("chosen by", *kinds, title=title)
    for name, figure in figures.items():
        cells = [f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for f in figure.values()]
        rows.add_row(name, *cells)
    return rows


if __name__ == "__main__":
    main()
