"""Prompts as token ids, and answers to them, each with its own mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from pliant.anatomy import Anatomy
from pliant.data import chat_ids, check_text, has_chat_template, normalised, ordinary_text
from pliant.errors import InvalidInput
from pliant.experts.model import svf_layers, use_rows
from pliant.experts.rows import Mixture, Rows
from pliant.prefill import Batch, alike, device_of, supports_padding

MAX_NEW_TOKENS = 64

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or a conversation as a list of messages."""


def experts_on(model: nn.Module) -> tuple[str, ...]:
    """The names of the experts on a model, in the order in which they were added."""
    names = dict.fromkeys(name for _, layer in svf_layers(model) for name in layer.changes())
    if not names:
        raise InvalidInput(f"{type(model).__name__} has no experts: load at least one")
    known = getattr(model, "peft_config", names)
    return tuple(name for name in known if name in names)


def first_expert_layer(model: nn.Module) -> int:
    """The first layer that any expert changes: the layers before it are the base's for all."""
    return min((layer.layer_index or 0) for _, layer in svf_layers(model))


def without_experts(model: nn.Module | Anatomy) -> AbstractContextManager[None]:
    """Run the base inside the block, whichever expert is active."""
    return use_rows(model, Rows((), torch.zeros(1, 0)))


def encode(prompts: Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
    """Each prompt's ids, ready for an answer; a text is a user's message, if there are chats."""
    if isinstance(prompts, str | Mapping):
        raise InvalidInput("prompts is one prompt; give a list: [prompt]")
    return [_encode(prompt, tokenizer, f"prompt {i}") for i, prompt in enumerate(prompts)]


def _encode(prompt: Prompt, tokenizer: Any, where: str) -> list[int]:
    if isinstance(prompt, str):
        check_text(prompt, where)
        if not has_chat_template(tokenizer):
            ids = list(tokenizer(ordinary_text(prompt, tokenizer))["input_ids"])
            if not ids:
                raise InvalidInput(f"{where} is empty: there is no token to continue from")
            return ids
        prompt = [{"role": "user", "content": prompt}]
    return chat_ids(prompt, tokenizer, where=where)


def key_of(prompt: Prompt) -> str:
    """What makes two prompts the same: their text, whatever its case and white space."""
    if isinstance(prompt, str):
        return normalised(prompt)
    messages: Any = prompt
    if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
        raise InvalidInput(f"the prompt {prompt!r:.80} is neither a text nor a list of messages")
    return normalised("\n".join(str(message.get("content")) for message in prompt))


def batches(
    model: nn.Module | Anatomy,
    ids: Sequence[Sequence[int]],
    batch_size: int | None = None,
    *,
    new: int = 0,
) -> Iterator[tuple[list[int], Batch]]:
    """Prompts of similar length, of equal length if padding changes the model's output.

    A prompt that is longer than the model's context, with `new` tokens of an answer, is refused.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    lengths = [len(each) for each in ids]
    _check_context(anatomy, max(lengths, default=0), new)
    equal = len(set(lengths)) > 1 and not supports_padding(anatomy)
    for rows in alike(lengths, batch_size, equal=equal):
        device = device_of(anatomy.embeddings)
        yield rows, Batch.of([ids[row] for row in rows], device=device)


def _check_context(anatomy: Anatomy, longest: int, new: int) -> None:
    limit = getattr(anatomy.config, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < longest + new:
        answer = f" and an answer of up to {new:,}" if new else ""
        raise InvalidInput(
            f"a prompt of {longest:,} tokens{answer}: longer than the model's context of {limit:,}"
        )


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    mixtures: Sequence[Mixture],
    *,
    batch_size: int | None = None,
    **generation: Any,
) -> list[str]:
    """The answer to each prompt with its own mixture of experts, many in one batch.

    `generation` goes to the model's `generate`; greedy, at most 64 tokens unless it says otherwise.
    """
    if len(mixtures) != len(prompts):
        raise InvalidInput(
            f"{len(mixtures)} mixtures for {len(prompts)} prompts: give one for each"
        )
    names, answers = experts_on(model), [""] * len(prompts)
    anatomy, ids = Anatomy.of(model), encode(prompts, tokenizer)
    for rows, batch in batches(anatomy, ids, batch_size, new=longest_answer(generation)):
        with use_rows(anatomy, Rows.of_mixtures([mixtures[row] for row in rows], names)):
            texts = generate_batch(model, tokenizer, batch, **generation)
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text
    return answers


def longest_answer(generation: Mapping[str, Any]) -> int:
    """In tokens, of these settings for `generate`."""
    return int(generation.get("max_new_tokens", MAX_NEW_TOKENS))


def generate_batch(model: Any, tokenizer: Any, batch: Batch, **generation: Any) -> list[str]:
    """The model's answers to a batch, by plain `generate`."""
    pad = tokenizer.pad_token_id
    settings = {
        "max_new_tokens": MAX_NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": (tokenizer.eos_token_id or 0) if pad is None else pad,
        **generation,
    }
    with torch.no_grad():
        out = model.generate(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, **settings)
    new = out[:, batch.ids_BT.shape[1] :]
    return list(tokenizer.batch_decode(new, skip_special_tokens=True))
