"""Greedy answers to many prompts at once, through the chat template and plain `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pliant.data import chat_text, check_text
from pliant.errors import InvalidInput

_LONGEST_ANSWER = 24  # tokens: the longest right answer has 22 letters and an end
_TOKENS_A_BATCH = 8_192


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[str]:
    """One answer a prompt. Prompts of like length share a batch, so little is spent on padding.

    A prompt is plain text: one that holds a mark of the chat template could put words into the
    model's mouth, and is refused, as is one that leaves no room for an answer.
    """
    if len(prompts) == 0:
        return []
    _refuse_what_is_no_text(prompts, tokenizer.all_special_tokens)
    found = [""] * len(prompts)
    texts = [chat_text([{"role": "user", "content": prompt}], tokenizer) for prompt in prompts]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    _refuse_too_long(lengths, getattr(model.config, "max_position_embeddings", None))
    for rows in _alike(lengths):
        batch = tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True)
        out = model.generate(
            **batch.to(model.device), max_new_tokens=_LONGEST_ANSWER, do_sample=False
        )
        said = tokenizer.batch_decode(
            out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, text in zip(rows, said, strict=True):
            found[i] = text
    return found


def _refuse_what_is_no_text(prompts: Sequence[str], marks: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise InvalidInput("prompts is one text; give a list: [prompt]")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InvalidInput(f"prompt {i} is of type {type(prompt).__name__}; prompts are texts")
        mark = next((mark for mark in marks if mark in prompt), None)
        if mark is not None:
            raise InvalidInput(f"prompt {i} contains {mark!r}, a mark of the chat template")
        check_text(prompt, f"prompt {i}")


def _refuse_too_long(lengths: Sequence[int], context: int | None) -> None:
    if context is not None and max(lengths) + _LONGEST_ANSWER > context:
        i = max(range(len(lengths)), key=lengths.__getitem__)
        raise InvalidInput(
            f"prompt {i} is {lengths[i]:,} tokens long with its frame; beside an answer of "
            f"{_LONGEST_ANSWER} the model takes {context - _LONGEST_ANSWER:,}"
        )


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    rows: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if rows and (len(rows) + 1) * lengths[i] > _TOKENS_A_BATCH:
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows
