"""Rows of other formats, Alpaca's and ShareGPT's, in the columns that Pliant reads.

    standard({"instruction": "Add.", "input": "2 and 3", "output": "5"}, ["prompt", "answer"])
    # adds {"prompt": "Add.\\n\\n2 and 3", "answer": "5"}
    standard({"conversations": [{"from": "human", "value": "Hi"}, ...]})
    # adds {"messages": [{"role": "user", "content": "Hi"}, ...]}

Columns are added where they are missing; those of the row stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pliant.errors import InvalidInput

Row = dict[str, Any]
SHAREGPT = "conversations"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""ShareGPT's names of who speaks, and those of chat templates."""
ANSWERS = ("completion", "output")
"""Other names of the answer, in this order."""
ALPACA = "Below is an instruction that describes a task{more}. Write a response that appropriately "
ALPACA += "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
"""Alpaca's own prompt, for a model that has no chat template."""


def standard(row: Mapping[str, Any], wanted: Collection[str] = (), where: str = "a row") -> Row:
    """The row with those of its columns that another format has under another name."""
    result = dict(row)
    if "messages" not in row and is_conversation(row.get(SHAREGPT)):
        result["messages"] = row[SHAREGPT]
        if isinstance(system := row.get("system"), str) and system:
            result["messages"] = [{"from": "system", "value": system}, *row[SHAREGPT]]
    if is_conversation(result.get("messages")):
        result["messages"] = [_message(m, where) for m in result["messages"]]
    if "prompt" in wanted and "prompt" not in row:
        result |= _prompt_and_answer(result)
    answers = [row[name] for name in ANSWERS if isinstance(row.get(name), str)]
    for name in {"answer", "completion"}.intersection(wanted) if answers else ():
        result.setdefault(name, answers[0])
    return result


def is_alpaca(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str)


def alpaca_messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """As a conversation, which a chat template writes."""
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    user, answer = _alpaca_prompt(row), row["output"]
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return [*system, *turns]


def alpaca_text(row: Mapping[str, Any]) -> str:
    """As Alpaca's own prompt, for a model that has no chat template."""
    more, given = "", ""
    if row.get("input"):
        more = ", paired with an input that provides further context"
        given = f"### Input:\n{row['input']}\n\n"
    return ALPACA.format(more=more, instruction=row["instruction"], input=given)


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, in either format."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(isinstance(message, Mapping) for message in value)
    )


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if "role" in message or not {"from", "value"} <= message.keys():
        return dict(message)
    speaker = message["from"]
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise InvalidInput(f"{where}: a message is from {speaker!r}: give one of {known}")
    return {"role": role, "content": message["value"]}


def _prompt_and_answer(row: Row) -> Row:
    """What is asked, and what is the answer."""
    messages = row.get("messages")
    if is_conversation(messages):
        assert messages is not None
        last = messages[-1]
        if last.get("role") != "assistant":
            return {"prompt": messages}
        return {"prompt": messages[:-1], "answer": last.get("content")}
    if isinstance(row.get("instruction"), str):
        answer = {"answer": row["output"]} if is_alpaca(row) else {}
        return {"prompt": _alpaca_prompt(row), **answer}
    return {}


def _alpaca_prompt(row: Mapping[str, Any]) -> str:
    given = row.get("input")
    return f"{row['instruction']}\n\n{given}" if given else str(row["instruction"])
