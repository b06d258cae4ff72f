"""The proof of an export: reloaded with plain transformers, does it say what the live scorer says?

Asked with texts, through the reloaded tokenizer, in a padded batch, as a user would; with the
trained head, and with a random one besides: a head that has learned nothing yet agrees with all.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pliant import prefill
from pliant.complexity.facade.tokenizer import CPXTokenizer
from pliant.complexity.leaving.stock import Stock, table_of
from pliant.errors import UnsupportedModel
from pliant.prefill import Batch

if TYPE_CHECKING:
    from pliant.complexity.model import Complexity

TEXTS = (
    "What is 3 + 4?",
    "x",
    "[CPX] This is easy. [CPX] Or is it?",
    "Naïve café, 日本語 🙂\n\tand a tab",
    "The quick brown fox jumps over the lazy dog, again and again and again.",
)
LENGTHS = (3, 9, 21, 40, 60, 61)
"""Of prompts of random tokens, some longer than a tiny model's window. (A-X K2's sparse attention,
in a padded batch, chooses other positions than alone: the longer ones show it.)"""


@torch.no_grad()
def prove(
    scorer: Complexity,
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
    said = model(**inputs).logits.float()
    if head.bias is not None:
        said = said - head.bias.float()
        head.bias.zero_()
    first = _difference(said, F.linear(hidden_BD, trained))
    head.weight.copy_(random)
    second = _difference(model(**inputs).logits.float(), F.linear(hidden_BD, random))
    return max(first, second)


def _difference(ours_BL: Tensor, theirs_BL: Tensor) -> float:
    largest = max(1.0, float(theirs_BL.abs().max()))
    difference = float((ours_BL - theirs_BL).abs().max()) / largest
    return difference if difference == difference else float("inf")


def _hidden(scorer: Complexity, ids: list[int]) -> Tensor:
    """What the live scorer's head reads of one prompt, (1, D)."""
    batch = Batch.of([ids], device=scorer._place)
    found = prefill.on_top(
        scorer.anatomy,
        batch,
        scorer._placeholders(1, batch.ids_BT.device),
        layers=scorer.config.layer,
        entering=scorer._entering,
    )
    return found[:, -1].to(scorer.head.weight.device)


def _of_texts(cpx: CPXTokenizer, tokenizer: Any, rendered: bool) -> list[list[int]]:
    """The texts' ids without [CPX]; the reloaded tokenizer must agree on all of them."""
    found = []
    for text in TEXTS:
        ids = cpx(text, add_special_tokens=not rendered)["input_ids"]
        theirs = tokenizer(text)["input_ids"]
        if ids != theirs:
            raise UnsupportedModel(
                f"the tokenizer, reloaded by plain transformers as a {type(tokenizer).__name__}, "
                f"encodes {text!r} as {theirs}, and not as {ids}"
            )
        found.append(ids[:-1])
    return [ids for ids in found if ids]


def _random(scorer: Complexity, cpx: CPXTokenizer) -> list[list[int]]:
    special = set(cpx.all_special_ids)
    rows = min(len(table_of(scorer)), cpx.cpx_token_id)
    known = [i for i in range(rows) if i not in special]
    generator = torch.Generator().manual_seed(0)
    room = scorer._room or max(LENGTHS)
    return [
        [known[i] for i in torch.randint(len(known), (min(n, room),), generator=generator).tolist()]
        for n in LENGTHS
    ]
