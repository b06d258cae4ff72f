"""Answers to prompts: sampled groups that share each prompt's prefill, and greedy ones.

Shapes: B prompts, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from pliant.anatomy import Anatomy
from pliant.anatomy.find import device_of
from pliant.anatomy.modes import eval_mode
from pliant.prefill import Batch, groups, prefill, supports_cache, supports_padding
from pliant.prefill.forward import only_attends

TOKENS_A_BATCH = 8192


def sample_groups(
    model: Any, prompts: Sequence[Sequence[int]], copies: int, generation: GenerationConfig
) -> list[list[int]] | None:
    """`copies` answers to each prompt, one after the other; None if the prefill cannot be shared.

    Each prompt runs once, but for its last token, and its keys and values are repeated.
    """
    anatomy = Anatomy.of(model)
    if not can_share(anatomy, [len(prompt) for prompt in prompts]):
        return None
    batch = Batch.of(prompts, generation.pad_token_id or 0, device_of(anatomy.embeddings))
    with torch.no_grad():
        first = batch.ids_BT[:, :-1], batch.mask_BT[:, :-1]
        cache = prefill(anatomy, *first, head=False, resumable=False).cache
        if type(cache) is not DynamicCache or not only_attends(cache):
            return None
        cache.batch_repeat_interleave(copies)
        ids_BT = batch.ids_BT.repeat_interleave(copies, dim=0)
        mask_BT = batch.mask_BT.repeat_interleave(copies, dim=0)
        out = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            past_key_values=cache,
            generation_config=generation,
        )
    return up_to_end(out[:, ids_BT.shape[1] :], generation.eos_token_id)


def can_share(anatomy: Anatomy, lengths: Sequence[int]) -> bool:
    """Whether a step on the model's cache is exact, for prompts of these lengths."""
    if min(lengths) < 2 or not supports_cache(anatomy):
        return False
    return len(set(lengths)) == 1 or supports_padding(anatomy)


def greedy_answers(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, tokenizer: Any
) -> list[list[int]]:
    """The token ids of the greedy answer to each prompt, in their order."""
    anatomy = Anatomy.of(model)
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=end_ids(model, tokenizer),
    )
    answers: list[list[int]] = [[] for _ in prompts]
    with torch.no_grad(), eval_mode(model):
        for rows in _by_length(prompts, max_new_tokens):
            batch = Batch.of([prompts[i] for i in rows], pad_id(tokenizer), device_of(model))
            for part in groups(anatomy, batch):
                own = batch if part is None else batch.select(part)
                out = model.generate(
                    input_ids=own.ids_BT, attention_mask=own.mask_BT, generation_config=generation
                )
                new = up_to_end(out[:, own.ids_BT.shape[1] :], generation.eos_token_id)
                for i, answer in zip(range(len(rows)) if part is None else part, new, strict=True):
                    answers[rows[i]] = answer
    return answers


def up_to_end(ids_BT: Tensor, ends: int | Sequence[int] | None) -> list[list[int]]:
    """Each row up to and with its first end token."""
    known = set(ends) if isinstance(ends, Sequence) else {ends}
    answers = []
    for row in ids_BT.tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in known), len(row))
        answers.append(row[:stop])
    return answers


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer, the model's and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    several = own if isinstance(own, list) else [own]
    return [i for i in dict.fromkeys([*several, tokenizer.eos_token_id]) if i is not None]


def pad_id(tokenizer: Any) -> int:
    pad: int | None = tokenizer.pad_token_id
    return pad if pad is not None else tokenizer.eos_token_id or 0


def _by_length(prompts: Sequence[Sequence[int]], new: int) -> Iterator[list[int]]:
    """Rows of similar lengths, with about so many tokens in all."""
    rows: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        if rows and (len(rows) + 1) * (len(prompts[i]) + new) > TOKENS_A_BATCH:
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows
