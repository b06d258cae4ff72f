"""Verifies an export: reloads it with plain transformers and compares it with the live scorer.

The copy scores texts through its reloaded tokenizer, in a padded batch, with the trained head and
with a random one: an untrained head, all zeros, would agree with anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pliant import prefill
from pliant.complexity.export.stock import Stock, table_of
from pliant.complexity.scorer import PromptScorer
from pliant.complexity.tokenizer import CPXTokenizer
from pliant.errors import UnsupportedModel
from pliant.prefill import Batch

TEXTS = (
    "What is 3 + 4?",
    "x",
    "[CPX] This is easy. [CPX] Or is it?",
    "Naïve café, 日本語 🙂\n\tand a tab",
    "The quick brown fox jumps over the lazy dog, again and again and again.",
)
LENGTHS = (3, 9, 21, 40, 60, 61)
"""Lengths of prompts of random tokens, some longer than a tiny model's window. (A-X K2's sparse
attention selects other positions in a padded batch than alone; the longer prompts detect it.)"""


@torch.no_grad()
def prove(
    scorer: PromptScorer,
    cpx: CPXTokenizer,
    folder: Path,
    stock: Stock,
    scale: float,
    rendered: bool,
) -> float:
    """The largest difference of a logit, relative to the largest logit where that is above 1."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [*_of_texts(cpx, tokenizer, rendered), *_random(scorer, cpx)]
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=stock.dtype, attn_implementation=scorer.anatomy.config._attn_implementation
    ).eval()
    model = model.to(scorer.rows.device)
    inputs = tokenizer.pad(
        {"input_ids": [[*ids, cpx.cpx_token_id] for ids in prompts]}, return_tensors="pt"
    ).to(scorer.rows.device)
    hidden_BD = torch.cat([_hidden(scorer, ids) for ids in prompts]).float()
    head = model.get_submodule(stock.head)
    trained = scorer.head.weight.float() * scale
    random = torch.randn(trained.shape, generator=torch.Generator().manual_seed(0))
    random = random.to(trained) / trained.shape[1] ** 0.5
    logits = model(**inputs).logits.float()
    if head.bias is not None:
        logits = logits - head.bias.float()
        head.bias.zero_()
    first = _difference(logits, F.linear(hidden_BD, trained))
    head.weight.copy_(random)
    second = _difference(model(**inputs).logits.float(), F.linear(hidden_BD, random))
    return max(first, second)


def _difference(ours_BL: Tensor, theirs_BL: Tensor) -> float:
    largest = max(1.0, float(theirs_BL.abs().max()))
    difference = float((ours_BL - theirs_BL).abs().max()) / largest
    return difference if difference == difference else float("inf")


def _hidden(scorer: PromptScorer, ids: list[int]) -> Tensor:
    """The hidden state that the live scorer's head reads for one prompt, (1, D)."""
    batch = Batch.of([ids], device=scorer.device)
    hidden = prefill.on_top(
        scorer.anatomy,
        batch,
        scorer.placeholders(1),
        layers=scorer.config.layer,
        step_context=scorer.activate,
    )
    return hidden[:, -1].to(scorer.head.weight.device)


def _of_texts(cpx: CPXTokenizer, tokenizer: Any, rendered: bool) -> list[list[int]]:
    """The texts' ids without [CPX]; the reloaded tokenizer must agree on all of them."""
    encoded = []
    for text in TEXTS:
        ids = cpx(text, add_special_tokens=not rendered)["input_ids"]
        theirs = tokenizer(text)["input_ids"]
        if ids != theirs:
            raise UnsupportedModel(
                f"the tokenizer, reloaded by plain transformers as a {type(tokenizer).__name__}, "
                f"encodes {text!r} as {theirs}, and not as {ids}"
            )
        encoded.append(ids[:-1])
    return [ids for ids in encoded if ids]


def _random(scorer: PromptScorer, cpx: CPXTokenizer) -> list[list[int]]:
    special = set(cpx.all_special_ids)
    rows = min(len(table_of(scorer)), cpx.cpx_token_id)
    vocabulary = [i for i in range(rows) if i not in special]
    generator = torch.Generator().manual_seed(0)
    longest = scorer.max_prompt_length or max(LENGTHS)
    shapes = [(min(length, longest),) for length in LENGTHS]
    draws = [torch.randint(len(vocabulary), shape, generator=generator) for shape in shapes]
    return [[vocabulary[i] for i in draw.tolist()] for draw in draws]
