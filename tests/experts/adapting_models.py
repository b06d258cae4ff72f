"""A nano model with two experts that were trained for a second each, for the tests of adapting."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from peft import get_peft_model

from pliant import nano
from pliant.data import assistant_tokens
from pliant.data.collate import IGNORED, Collator
from pliant.experts import SVFConfig

EXPERTS = {"words": ("sort", "reverse"), "sums": ("add",)}
STEPS, ROWS = 12, 16


@cache
def nano_with_experts(first_layer: int = 0) -> tuple[Any, Any]:
    """Experts on the layers from `first_layer` on; shared by tests, which leave it as it is."""
    torch.manual_seed(0)
    model, tokenizer = nano.load("nano-s")
    layers = list(range(first_layer, len(model.model.layers)))
    # Layers are chosen among named modules.
    options: dict[str, Any] = {"target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"]}
    if first_layer:
        options["layers_to_transform"] = layers
    peft = get_peft_model(model, SVFConfig(**options), adapter_name="words")
    peft.add_adapter("sums", SVFConfig(**options))
    for name, families in EXPERTS.items():
        _train(peft, tokenizer, name, families)
    return peft.requires_grad_(False).eval(), tokenizer


def questions(split: str, n: int, families: Sequence[str]) -> list[nano.Question]:
    return [q for f in families for q in nano.questions(split, n, families=[f])]


def _train(peft: Any, tokenizer: Any, name: str, families: Sequence[str]) -> None:
    peft.set_adapter(name)
    rows = []
    for question in nano.questions("train", STEPS * ROWS, families=families):
        asked, answered = ("user", question.prompt), ("assistant", question.answer)
        messages = [{"role": role, "content": text} for role, text in (asked, answered)]
        ids, learned = assistant_tokens(messages, tokenizer)
        labels = [i if own else IGNORED for i, own in zip(ids, learned, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    collate = Collator.of(tokenizer)
    optimizer = torch.optim.Adam([p for p in peft.parameters() if p.requires_grad], lr=0.02)
    for step in range(STEPS):
        loss = peft(**collate(rows[step * ROWS : (step + 1) * ROWS])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
