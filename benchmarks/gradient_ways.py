"""The regimes of the race: the model, its data, and the contenders."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks import gradient_material as material
from benchmarks import gradient_records as records
from benchmarks import real_model
from pliant import nano
from pliant.data.collate import Collator
from pliant.gradients import GradientConfig
from pliant.gradients.audit.audit import cost_share
from pliant.gradients.audit.contenders import STANDARD, Batch, Contender, LossOf

DEFAULT = GradientConfig(ratio=0.25)
COMPLETION = GradientConfig(engine="completion")
ONE_HOP = replace(DEFAULT, kv_grad="one_hop")


@dataclass(frozen=True)
class Regime:
    """A model, its data and the settings of its training."""

    begin: Callable[[int], Any]
    """The model that a seed starts with."""
    rows: Callable[[argparse.Namespace], material.Material]
    size: int
    """Rows a step."""
    rates: tuple[float, ...]
    held: int = 32
    fewer: tuple[float, ...] = ()
    """Smaller batches besides the one of equal cost."""
    also: tuple[GradientConfig, ...] = ()
    """Our configurations besides the usual ones."""


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
"""The head is more than half of the model, as in a small model with a large vocabulary."""
NEW = 64
"""The number of persons or characters to learn."""
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

GENTLE = (3e-5, 1e-4, 3e-4)


def real_regimes(model: str) -> dict[str, Regime]:
    """Fine-tuning a real model: on GSM8K's answers, and on records that are new to it."""

    def begin(seed: int) -> Any:
        return real_model.real_model(model).requires_grad_(True).train()

    def encode(text: str) -> list[int]:
        return list(real_model.tokenizer(model)(text, add_special_tokens=False).input_ids)

    return {
        "instructions": Regime(
            begin,
            lambda options: material.instructions(options.data, 256, encode=encode),
            4,
            GENTLE,
            held=16,
        ),
        "unicode": Regime(
            begin,
            lambda options: records.characters(NEW, encode, a_row=1),
            4,
            GENTLE,
            held=16,
            also=(ONE_HOP,),
        ),
    }


def is_ours(contender: Contender) -> bool:
    """What we recommend; all others are controls."""
    return contender.config is not None and contender.config.selection == "sampled"


def dense_contenders() -> list[Contender]:
    """The default with dense steps at the start and at intervals."""
    kinds = product((0, 4, 8), (0, 4, 8))
    configs = [replace(DEFAULT, dense_first=first, dense_every=every) for every, first in kinds]
    return [STANDARD, *(Contender("tokens", config) for config in configs)]


def dynamic_contenders() -> list[Contender]:
    """The default, and the same with a ratio that follows the model's confidence."""
    configs = [DEFAULT, replace(DEFAULT, dynamic=True)]
    return [STANDARD, *(Contender("tokens", config) for config in configs)]


def contenders_for(regime: Regime, rows: material.Material) -> list[Contender]:
    """Ours, standard training, random tokens, fewer or harder rows, and the `cggr` package."""
    model, batch = regime.begin(0), next(rows.batches(regime.size, 0))
    has_prompts = any(label == material.IGNORED for label in rows.train[0]["labels"])
    best = COMPLETION if has_prompts else DEFAULT
    share = cost_share(model, batch, best, None) or 1.0
    configs = [DEFAULT, replace(DEFAULT, selection="uniform"), replace(DEFAULT, engine="exact")]
    if has_prompts:
        configs.insert(0, COMPLETION)
    contenders = [
        STANDARD,
        *(Contender("tokens", config) for config in configs),
        Contender("custom", title="CGGRLoss", prepare=_cggr_loss),
        *(Contender("tokens", config) for config in regime.also),
    ]
    if regime.size > 1:
        equal_cost = max(1, round(share * regime.size)) / regime.size
        sizes = dict.fromkeys((equal_cost, *regime.fewer))
        contenders += [Contender("rows", share=size) for size in sizes]
        contenders.append(CGGR_MODEL)
        contenders.append(Contender("tokens", replace(DEFAULT, selection="topk")))
    length = float(np.mean([len(row["input_ids"]) for row in rows.train]))
    if regime.size == 1 or has_prompts:
        contenders.append(truncated(max(8, round(share * length))))
    return contenders


def truncated(most: int) -> Contender:
    """Standard training on the last tokens of each row."""

    def prepare(model: Any) -> LossOf:
        return lambda batch: model(**_last_tokens(batch, most)).loss

    return Contender("custom", title=f"rows cut to {most} tokens", prepare=prepare)


def _last_tokens(batch: Batch, most: int) -> Batch:
    if bool(batch["attention_mask"].all()):
        return {name: value[:, -most:] for name, value in batch.items()}
    rows = []
    for ids, labels, mask in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        end = int(mask.sum())
        part = slice(max(0, end - most), end)
        rows.append({"input_ids": ids[part], "labels": labels[part]})
    return Collator()(rows)


def _cggr_model(model: Any) -> LossOf:
    """In its steady state, with a router of half the layers."""
    from cggr import CGGRModel, create_truncated_router

    half = max(1, len(model.model.layers) // 2)
    router = create_truncated_router(model, num_layers=half)
    theirs = CGGRModel(model, router=router, min_tokens_ratio=0.25, warmup_steps=1)
    theirs.train()
    theirs.step()
    return lambda batch: theirs(batch["input_ids"], labels=batch["labels"])


def _cggr_loss(model: Any) -> LossOf:
    """Given the labelled pairs alone: it has no notion of a token without a label."""
    from cggr import CGGRLoss

    criterion = CGGRLoss(min_tokens_ratio=0.25, warmup_steps=1)
    criterion.step()

    def loss(batch: Batch) -> Tensor:
        targets = batch["labels"][:, 1:]
        learned = targets != material.IGNORED
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return criterion(logits[:, :-1][learned], targets[learned])

    return loss


CGGR_MODEL = Contender("custom", title="CGGRModel", prepare=_cggr_model)
