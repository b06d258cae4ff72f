"""Conversations as token ids, through the model's own chat template: the only place that calls it.

chat_ids(messages, tokenizer)            # ready for an answer: with the generation prompt
ids, learned = assistant_tokens(messages, tokenizer)    # which tokens the assistant wrote
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pliant.errors import InvalidInput


def has_chat_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def chat_text(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    generation_prompt: bool = True,
    where: str = "the prompt",
) -> str:
    """The conversation as the chat template writes it; `where` names it in an error."""
    from jinja2 import TemplateError

    check_messages(messages, where)
    if not has_chat_template(tokenizer):
        raise InvalidInput(
            f"{where} is a list of messages, and the tokenizer has no chat template: give text"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt
        )
    except TemplateError as error:  # no system role, say, or roles that do not alternate
        raise InvalidInput(f"{where}: the chat template refuses the messages: {error}") from error
    check_text(text, where)
    return text


def chat_ids(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    generation_prompt: bool = True,
    where: str = "the prompt",
) -> list[int]:
    """The conversation's token ids. The template writes the special tokens, the tokenizer none."""
    text = chat_text(messages, tokenizer, generation_prompt=generation_prompt, where=where)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def assistant_tokens(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, *, where: str = "the prompt"
) -> tuple[list[int], list[bool]]:
    """The conversation's ids, and for each whether the assistant wrote it.

    An assistant's tokens are those that its message adds to the conversation before it.
    """
    ids = chat_ids(messages, tokenizer, generation_prompt=False, where=where)
    assistant = [False] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = chat_ids(messages[:i], tokenizer, where=where) if i else []
        after = chat_ids(messages[: i + 1], tokenizer, generation_prompt=False, where=where)
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise InvalidInput(
                f"{where}: the chat template writes a message differently once another follows, so "
                "the assistant's tokens cannot be identified. Give prompt and completion"
            )
        assistant[len(before) : len(after)] = [True] * (len(after) - len(before))
    return ids, assistant


def check_messages(messages: Any, where: str = "the prompt") -> None:
    """Refuse what is not a conversation: a template renders missing keys as nothing."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InvalidInput(
            f'{where}: give messages as a list of {{"role": "user", "content": "..."}}'
        )
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not (
            isinstance(message.get("role"), str)
            and (isinstance(message.get("content"), (str, list)) or "tool_calls" in message)
        ):
            shown = dict(message) if isinstance(message, Mapping) else message
            raise InvalidInput(f"{where}: message {i} is {shown!r}: give a role and a content")


def check_text(text: str, where: str = "the prompt") -> None:
    """Refuse a text that no tokenizer can encode."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InvalidInput(f"{where} contains half a character (a lone surrogate)")
