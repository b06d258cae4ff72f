"""Turns prompts (texts, messages, ids) into lists of ids, and checks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pliant.complexity.tokenizer import plain_ids
from pliant.data import chat_text, check_text, has_chat_template
from pliant.errors import InvalidInput
from pliant.prefill import align

Truncation = Literal["left", "right"]


def ids_of(
    prompts: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None, chat: bool = False
) -> list[list[int]]:
    """Each prompt's ids, without the [CPX] that may end it: a text as it is, messages through the
    chat template with its generation prompt. With `chat`, a text is a user's message."""
    if isinstance(prompts, (str, Mapping)):
        raise InvalidInput("prompts is one prompt; give a list: [prompt]")
    return [_ids(i, prompt, tokenizer, chat) for i, prompt in enumerate(prompts)]


def unpadded(ids_BT: Tensor, mask_BT: Tensor | None) -> list[list[int]]:
    """The rows of a tensor as lists, without masked positions."""
    batch = align(ids_BT, mask_BT)
    rows = zip(batch.ids_BT.tolist(), batch.lengths, strict=True)
    return [row[len(row) - length :] for row, length in rows]


def padding(ids_BT: Tensor, pad: int | None, ends: Sequence[int | None]) -> Tensor | None:
    """The mask that `generate` assumes for ids without one: the padding token is masked, unless it
    also ends texts."""
    return None if pad is None or pad in ends else ids_BT != pad


def check_padding(ids_BT: Tensor, pad: int | None, ends: Sequence[int | None]) -> None:
    """Refuse ids that seem to be padded with a token that also ends texts."""
    if pad not in ends or pad is None or ids_BT.dim() != 2 or not ids_BT.numel():
        return
    for side, of_row in (("begins", ids_BT), ("ends", ids_BT.flip(1))):
        run_B = (of_row == pad).long().cumprod(dim=1).sum(dim=1)
        if int(run_B.min()) != int(run_B.max()) or int(run_B.min()) > 1:
            row = int(run_B.argmax())
            raise InvalidInput(
                f"row {row} of the tensor {side} with {int(run_B[row])} of the token {pad}, which "
                "pads and also ends texts: pass attention_mask=, or lists of ids without padding"
            )


def checked(
    prompts: Sequence[list[int]],
    max_length: int | None,
    truncation: Truncation | None,
    vocabulary: int | None = None,
) -> list[list[int]]:
    """The prompts, truncated to `max_length` on the side that `truncation` names.

    Without `truncation`, a longer prompt is an error, as is an id outside the vocabulary.
    """
    if truncation not in (None, "left", "right"):
        raise InvalidInput(f"truncation = {truncation!r}: give 'left', 'right' or None")
    for i, ids in enumerate(prompts):
        if ids and (min(ids) < 0 or (vocabulary is not None and max(ids) >= vocabulary)):
            raise InvalidInput(
                f"prompt {i} holds ids from {min(ids)} to {max(ids)}, and the model has "
                f"{vocabulary} embeddings: are they of another tokenizer?"
            )
    if max_length is None:
        return list(prompts)
    for i, ids in enumerate(prompts):
        if len(ids) > max_length and truncation is None:
            raise InvalidInput(
                f"prompt {i} is {len(ids):,} tokens long; the model takes {max_length:,} beside "
                "what follows. Shorten it, or remove its beginning: truncation='left' in Python, "
                "--truncation left of `score`, --truncate of `train scorer`"
            )
    if truncation == "left":
        return [ids[max(0, len(ids) - max_length) :] for ids in prompts]
    return [ids[:max_length] for ids in prompts]


def _ids(i: int, prompt: Any, tokenizer: PreTrainedTokenizerBase | None, chat: bool) -> list[int]:
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        _need(tokenizer, i, "a text")
        if chat and not has_chat_template(tokenizer):
            raise InvalidInput(
                f"prompt {i} was to go through the chat template, and the tokenizer has none: "
                "leave chat out, and texts are read as they are"
            )
        if chat:
            return _ids(i, [{"role": "user", "content": prompt}], tokenizer, chat)
        assert tokenizer is not None
        check_text(prompt, f"prompt {i}")
        return plain_ids(tokenizer, prompt)
    if isinstance(prompt, Sequence) and prompt and all(isinstance(m, Mapping) for m in prompt):
        _need(tokenizer, i, "a list of messages")
        assert tokenizer is not None
        # The template writes the BOS token; the tokenizer must not write it again.
        text = chat_text(prompt, tokenizer, where=f"prompt {i}")
        return plain_ids(tokenizer, text, literal=True, add_special_tokens=False)
    if _are_ids(prompt):
        ends = getattr(tokenizer, "cpx_token_id", None)
        return list(prompt[:-1] if prompt and prompt[-1] == ends else prompt)
    raise InvalidInput(
        f"prompt {i} is of type {type(prompt).__name__}: give a text, a list of messages "
        '({"role": ..., "content": ...}), or a list of ids'
    )


def _are_ids(prompt: Any) -> bool:
    """Whether it is a sequence of ids: bytes and booleans are numbers too, but no ids."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, (bytes, bytearray))
        and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt)
    )


def _need(tokenizer: PreTrainedTokenizerBase | None, i: int, what: str) -> None:
    if tokenizer is None:
        raise InvalidInput(
            f"prompt {i} is {what}, and the scorer has no tokenizer: set scorer.tokenizer, or "
            "give ids"
        )
