"""Regimes of the race: what is trained, from where, on what; and by which ways."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from benchmarks import gradient_material as material
from benchmarks import gradient_records as records
from pliant import nano
from pliant.data.collate import Collator
from pliant.gradients import GradientConfig
from pliant.gradients.audit import contenders
from pliant.gradients.audit.audit import cost_share
from pliant.gradients.audit.contenders import Contender, Field, steady
from pliant.gradients.schedule import Schedule

Batch = Mapping[str, Any]
Step = Callable[[Batch, int], None]
"""Forward and backward of a batch, by this draw."""

DEFAULT = GradientConfig(ratio=0.25)
COMPLETION = GradientConfig(engine="completion")
ONE_HOP = replace(DEFAULT, kv_grad="one_hop")


@dataclass(frozen=True)
class Regime:
    """What is trained, from where, on what."""

    begin: Callable[[int], Any]
    """The model that a seed starts with."""
    rows: Callable[[argparse.Namespace], material.Material]
    size: int
    """Rows a step."""
    rates: tuple[float, ...]
    held: int = 32
    fewer: tuple[float, ...] = ()
    """Smaller batches besides that of equal cost."""
    also: tuple[GradientConfig, ...] = ()
    """Ours besides the usual."""


def _base(seed: int) -> Any:
    return material.pretrained(300)


def _nano_l(seed: int) -> Any:
    return nano.load("nano-l")[0].train()


def _read_forms(seed: int) -> Any:
    return material.trained("people", FORMS, records.other_people(128), 300, 3e-3, 0.3, 4)


def _read_unicode(seed: int) -> Any:
    return material.trained("characters", FORMS, records.other_characters(NEW), 500, 3e-3, 0.3, 4)


FINE = (5e-4, 1e-3, 2e-3)
FORMS = {"words": records.WORDS, "width": 128, "layers": 4}
"""A head that is more than half of a model, as a small model of a large vocabulary has it."""
NEW = 64
"""Whom the forms, and what the characters, are about."""
# Of 2, 4, 8 and 16 records a step, 4 took standard training to its loss soonest; 8 was as good.
RECORDS: dict[str, Any] = {
    "size": 2,
    "rates": (1e-3, 2e-3, 4e-3),
    "held": 12,
    "also": (ONE_HOP,),
}
REGIMES = {
    "scratch": Regime(
        lambda seed: material.fresh(seed, 256, 96, 4),
        lambda options: material.source(128, 256),
        8,
        (1e-3, 2e-3, 4e-3),
    ),
    "large batch": Regime(
        lambda seed: material.fresh(seed, 256, 96, 4),
        lambda options: material.source(128, 256),
        64,
        (1e-3, 2e-3, 4e-3),
        fewer=(0.25, 0.125),
    ),
    "records": Regime(_read_forms, lambda options: records.people(NEW), **RECORDS),
    "unicode": Regime(_read_unicode, lambda options: records.characters(NEW), **RECORDS),
    "continued": Regime(_base, lambda options: material.prose(96), 8, FINE),
    "one long row": Regime(_base, lambda options: material.prose(1024), 1, FINE, held=4),
    "instructions": Regime(
        _base, lambda options: material.instructions(options.data, 256), 4, FINE, held=16
    ),
    "worked examples": Regime(
        _base, lambda options: material.instructions(options.data, 256, 3), 1, FINE, held=8
    ),
    "questions": Regime(_nano_l, lambda options: material.questions(4000, 256), 16, FINE, held=256),
    "long prompts": Regime(_nano_l, lambda options: material.lookups(4000, 96), 8, FINE, held=96),
}


@dataclass(frozen=True)
class Way:
    """One way to train."""

    contender: Contender = contenders.STANDARD
    peer: str | None = None
    """Of the `cggr` package."""
    most: int | None = None
    """The tokens that are left of a row: its last ones."""
    ours: bool = False

    @property
    def name(self) -> str:
        if self.most is not None:
            return f"rows cut to {self.most} tokens"
        return self.peer or self.contender.name

    @property
    def steady(self) -> Way:
        """Without dense steps."""
        config = self.contender.config
        if config is None:
            return self
        return replace(self, contender=replace(self.contender, config=steady(config)))

    def dense_steps(self) -> Iterator[bool]:
        """Of each step, without end: whether it trains every token of its own accord."""
        schedule = Schedule(self.contender.config or DEFAULT)
        while True:
            yield schedule.is_dense()
            schedule.forward_seen()

    @contextmanager
    def on(self, model: Any) -> Iterator[Step]:
        if self.peer is not None:
            yield PEERS[self.peer](model)
            return
        with Field(model, [self.contender]) as field:
            yield lambda batch, draw: field.step(self.contender, self.cut(batch), draw)

    def cut(self, batch: Batch) -> Batch:
        if self.most is None:
            return batch
        if bool(batch["attention_mask"].all()):
            return {name: value[:, -self.most :] for name, value in batch.items()}
        rows = []
        for ids, labels, mask in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
        ):
            end = int(mask.sum())
            part = slice(max(0, end - self.most), end)
            rows.append({"input_ids": ids[part], "labels": labels[part]})
        return Collator()(rows)


STANDARD = Way()


def dense_ways() -> list[Way]:
    """The default with dense steps at the start, and now and then."""
    kinds = product((0, 4, 8), (0, 4, 8))
    configs = [replace(DEFAULT, dense_first=first, dense_every=every) for every, first in kinds]
    return [STANDARD, *(Way(Contender("tokens", config), ours=True) for config in configs)]


def ways_for(regime: Regime, rows: material.Material) -> list[Way]:
    """Ours, standard training, random tokens, fewer or harder rows, the peers."""
    model, batch = regime.begin(0), next(rows.batches(regime.size, 0))
    has_prompts = any(label == material.IGNORED for label in rows.train[0]["labels"])
    best = COMPLETION if has_prompts else DEFAULT
    share = cost_share(model, batch, best, None, None) or 1.0
    found = [
        STANDARD,
        Way(Contender("tokens", DEFAULT), ours=True),
        Way(Contender("tokens", replace(DEFAULT, selection="uniform"))),
        Way(Contender("tokens", replace(DEFAULT, engine="exact")), ours=True),
        Way(peer="CGGRLoss"),
        *(Way(Contender("tokens", it), ours=it.needs_scores) for it in regime.also),
    ]
    if has_prompts:
        found.insert(1, Way(Contender("tokens", COMPLETION), ours=True))
    if regime.size > 1:
        few = max(1, round(share * regime.size)) / regime.size
        hardest = replace(DEFAULT, selection="topk")
        sizes = dict.fromkeys((few, *regime.fewer))
        found += [Way(Contender("rows", share=size)) for size in sizes]
        found += [Way(peer="CGGRModel"), Way(Contender("tokens", hardest))]
    length = float(np.mean([len(row["input_ids"]) for row in rows.train]))
    if regime.size == 1 or has_prompts:
        found.append(Way(most=max(8, round(share * length))))
    return found


def _cggr_model(model: Any) -> Step:
    """In its steady state, with a router of half the layers."""
    from cggr import CGGRModel, create_truncated_router

    half = max(1, len(model.model.layers) // 2)
    router = create_truncated_router(model, num_layers=half)
    theirs = CGGRModel(model, router=router, min_tokens_ratio=0.25, warmup_steps=1)
    theirs.train()
    theirs.step()
    return lambda batch, draw: theirs(batch["input_ids"], labels=batch["labels"]).backward()


def _cggr_loss(model: Any) -> Step:
    """Given the labelled pairs alone: it knows no token that is not to be learned."""
    from cggr import CGGRLoss

    criterion = CGGRLoss(min_tokens_ratio=0.25, warmup_steps=1)
    criterion.step()

    def step(batch: Batch, draw: int) -> None:
        targets = batch["labels"][:, 1:]
        learned = targets != material.IGNORED
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        criterion(logits[:, :-1][learned], targets[learned]).backward()

    return step


PEERS = {"CGGRModel": _cggr_model, "CGGRLoss": _cggr_loss}
