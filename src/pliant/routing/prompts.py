"""Prompts, as a text or as the messages of a conversation, and what is stored of them."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence

from pliant.data import check_text
from pliant.errors import InvalidInput

Message = Mapping[str, str]
Prompt = str | Sequence[Message]


def messages(prompt: Prompt) -> list[dict[str, str]]:
    """The conversation; a text is its only message. Raises InvalidInput for anything else."""
    if isinstance(prompt, str):
        conversation: list[dict[str, str]] = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, Sequence) and len(prompt):
        conversation = [_message(message, at) for at, message in enumerate(prompt)]
    else:
        raise InvalidInput(f"a prompt is a text or a list of messages, not {_short(prompt)}")
    for message in conversation:
        check_text(message["content"], "a prompt")
    return conversation


def text_of(prompt: Prompt) -> str:
    """The prompt as one text, as scorers of texts and tables of labels have it."""
    conversation = messages(prompt)
    if len(conversation) == 1 and conversation[0]["role"] == "user":
        return conversation[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in conversation)


def digest(prompt: Prompt, salt: bytes = b"") -> str:
    """32 hex digits that identify a prompt, and reveal nothing about it without the salt."""
    content = json.dumps(messages(prompt), ensure_ascii=False, sort_keys=True).encode()
    return hmac.new(salt, content, hashlib.sha256).hexdigest()[:32]


def _message(message: object, at: int) -> dict[str, str]:
    if not isinstance(message, Mapping) or not (
        isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    ):
        raise InvalidInput(
            f"message {at} of a prompt is {_short(message)}: it needs a role and a content as text"
        )
    return {"role": message["role"], "content": message["content"]}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
