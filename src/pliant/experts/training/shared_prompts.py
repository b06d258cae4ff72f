"""Log-probabilities of several answers to each prompt, with one run of the prompt for all of them.

trl runs every answer behind its own copy of the prompt, forward and backward. A group of answers
has its prompt in common, so here the prompt runs once, its keys and values are repeated for its
answers, and their gradients meet in it. Only answers go through the head. Positions follow from the
mask, as they do while answers are sampled.

Shapes: B answers, P prompts, T positions; n positions of an answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from pliant.anatomy import Anatomy
from pliant.anatomy.modes import checkpointed
from pliant.errors import UnsupportedModel
from pliant.experts.training.answers import can_share
from pliant.prefill import Batch, align, prefill
from pliant.prefill.forward import inputs_of, only_attends


def score_answers(model: Any, ids_BT: Tensor, mask_BT: Tensor, length: int) -> Any:
    """trl's output (log_probs and entropy, the answers' in the last `length` columns) for answers
    of that length behind their prompts; None if nothing can be shared, or not exactly."""
    prompts_BT, answers_Bn = ids_BT[:, :-length], ids_BT[:, -length:]
    first, prompt_of_B = _different(prompts_BT, mask_BT[:, :-length])
    if len(first) == len(ids_BT) or not (anatomy := _anatomy(model)):
        return None
    prompts = align(prompts_BT[first], mask_BT[:, :-length][first])
    if not can_share(anatomy, prompts.lengths):
        return None
    if model.training and checkpointed(model):  # which drops the cache
        return None
    cache = _prefilled(anatomy, prompts)
    if cache is None:
        return None
    cache.batch_select_indices(prompt_of_B)
    whole = Batch(
        torch.cat([prompts.ids_BT[prompt_of_B], answers_Bn], dim=1),
        torch.cat([prompts.mask_BT[prompt_of_B], mask_BT[:, -length:]], dim=1),
    )
    labels = answers_Bn.masked_fill(mask_BT[:, -length:] == 0, -100)
    inputs = inputs_of(anatomy, whole, length + 1)  # the last prompt token predicts the first
    return model(
        **inputs,
        past_key_values=cache,
        labels=torch.nn.functional.pad(labels, (1, 0), value=-100),
        fused_lm_head=True,
    )


def _different(prompts_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of each different prompt, and which of them each row has."""
    key_BT = prompts_BT.masked_fill(mask_BT == 0, -1)
    different, prompt_of_B = key_BT.unique(dim=0, return_inverse=True)
    rows = torch.arange(len(key_BT), device=key_BT.device)
    first = rows.new_full((len(different),), len(key_BT))
    return first.scatter_reduce(0, prompt_of_B, rows, "amin"), prompt_of_B


def _prefilled(anatomy: Anatomy, prompts: Batch) -> DynamicCache | None:
    """The prompts' keys and values but for the last token's; with gradient, if it is enabled."""
    ids, mask = prompts.ids_BT[:, :-1], prompts.mask_BT[:, :-1]
    grad = torch.is_grad_enabled()
    part = prefill(anatomy, ids, mask, head=False, resumable=False, grad=grad).parts[0]
    cache = part.result.cache
    return cache if type(cache) is DynamicCache and only_attends(cache) else None


def _anatomy(model: Any) -> Anatomy | None:
    try:
        return Anatomy.of(model)
    except UnsupportedModel:
        return None
