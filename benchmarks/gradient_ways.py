"""Regimes of the race: what is trained, from where, on what; and by which ways."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks import gradient_material as material
from pliant import nano
from pliant.gradients import GradientConfig
from pliant.gradients.audit.audit import cost_share
from pliant.gradients.audit.contenders import STANDARD, Contender, Field
from pliant.gradients.audit.rows import padded

Batch = Mapping[str, Any]
Step = Callable[[Batch, int], None]
"""Forward and backward of a batch, by this draw."""

DEFAULT = GradientConfig(ratio=0.25)
COMPLETION = GradientConfig(engine="completion")


@dataclass(frozen=True)
class Regime:
    """What is trained, from where, on what."""

    begin: Callable[[int], Any]
    """The model that a seed starts with."""
    rows: Callable[[argparse.Namespace], material.Material]
    size: int
    rates: tuple[float, ...]
    held: int = 32


def _base(seed: int) -> Any:
    return material.pretrained(300)


def _nano_l(seed: int) -> Any:
    return nano.load("nano-l")[0].train()


FINE = (5e-4, 1e-3, 2e-3)
REGIMES = {
    "scratch": Regime(
        lambda seed: material.fresh(seed, 256, 96, 4),
        lambda options: material.source(128, 256),
        8,
        (1e-3, 2e-3, 4e-3),
    ),
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

    contender: Contender = STANDARD
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
        return padded(rows)


def ways_for(regime: Regime, rows: material.Material) -> list[Way]:
    """Ours, standard training, random tokens, fewer or harder rows, the peers."""
    model, batch = regime.begin(0), next(rows.batches(regime.size, 0))
    has_prompts = any(label == material.IGNORED for label in rows.train[0]["labels"])
    best = COMPLETION if has_prompts else DEFAULT
    share = cost_share(model, batch, best, None, None) or 1.0
    found = [
        Way(),
        Way(Contender("tokens", DEFAULT), ours=True),
        Way(Contender("tokens", replace(DEFAULT, selection="uniform"))),
        Way(Contender("tokens", replace(DEFAULT, engine="exact")), ours=True),
        Way(peer="CGGRLoss"),
    ]
    if has_prompts:
        found.insert(1, Way(Contender("tokens", COMPLETION), ours=True))
    if regime.size > 1:
        few = max(1, round(share * regime.size)) / regime.size
        hardest = replace(DEFAULT, selection="topk")
        found += [Way(Contender("rows", share=few)), Way(peer="CGGRModel")]
        found += [Way(Contender("tokens", hardest))]
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
