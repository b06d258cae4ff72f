"""Conversations as token ids, through the model's own chat template: the only place that calls it.

chat_ids(messages, tokenizer)            # ready for an answer: with the generation prompt
ids, learned = assistant_tokens(messages, tokenizer)    # which tokens the assistant wrote
ordinary_text(text, tokenizer)           # without a template: what a user wrote, and no more

What a message says never becomes a control token: a space after its first character makes ordinary
text of one, `< |user|>`. So nobody can write another turn into their own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

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
            [_ordinary_message(message, tokenizer) for message in messages],
            tokenize=False,
            add_generation_prompt=generation_prompt,
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


# --- control tokens ------------------------------------------------------------------------------


def ordinary_text(text: str, tokenizer: Any, role: str = "user") -> str:
    """The text, in which a special token of the tokenizer or its chat template is ordinary."""
    return str(_ordinary(text, _pattern_for(role, tokenizer)))


def _pattern_for(role: str, tokenizer: Any) -> re.Pattern[str]:
    """What others than the user say may hold tokens of the template that are not special: models
    write <think> and <tool_call>."""
    special, control = _patterns(tokenizer)
    return special if role in ("assistant", "system") else control


def _ordinary_message(message: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    pattern = _pattern_for(message["role"], tokenizer)
    return {k: v if k == "role" else _ordinary(v, pattern) for k, v in message.items()}


def _ordinary(value: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        while pattern.search(value):  # again, where the rest of a token is one itself
            value = pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", value)
        return value
    if isinstance(value, Mapping):
        return {k: _ordinary(v, pattern) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_ordinary(v, pattern) for v in value]
    return value


_known: WeakKeyDictionary[Any, tuple[Any, tuple[re.Pattern[str], re.Pattern[str]]]] = (
    WeakKeyDictionary()
)


def _patterns(tokenizer: Any) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Of the special tokens, and of these and all others that the chat template writes."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    state = (template, len(tokenizer))
    if _known.get(tokenizer, (None,))[0] != state:
        added = list(getattr(tokenizer, "added_tokens_decoder", {}).values())
        special = {token.content for token in added if token.special}
        special |= {*tokenizer.all_special_tokens} - {getattr(tokenizer, "cpx_token", None)}
        written = {token.content for token in added if token.content in template}
        _known[tokenizer] = state, (_pattern(special), _pattern(special | written))
    return _known[tokenizer][1]


def _pattern(tokens: set[str]) -> re.Pattern[str]:
    """Any of them, the longest first. White space and single letters are text in any case."""
    texts = [token for token in tokens if len(token.strip()) > 1]
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


# --- checks --------------------------------------------------------------------------------------


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
