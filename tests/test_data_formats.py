"""Rows of Alpaca and ShareGPT are read as Pliant's own, and any column can be named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pliant.cli.score import ScoreOptions, read_prompts
from pliant.cli.shared_options import AnswerColumns, RowOptions
from pliant.cli.training_text import read_data
from pliant.complexity.training.config import CPXDatasetConfig
from pliant.data import read_prompts as read_prompt_rows
from pliant.data import read_rows
from pliant.errors import InvalidInput
from pliant.loading import load_tokenizer
from pliant.training.texts import texts

ALPACA = [
    {"instruction": "Add.", "input": "2 and 3", "output": "5", "text": "Below is ..."},
    {"instruction": "Say hi.", "input": "", "output": "hi", "text": "Below is ..."},
]
SHAREGPT = [
    {
        "id": "a",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "2+3?"},
            {"from": "gpt", "value": "5"},
        ],
    }
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "content": "5"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("nano-s")


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_alpaca_has_prompts_and_answers(tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path, ALPACA), ("prompt", "answer"))
    assert [(r["prompt"], r["answer"]) for r in rows] == [
        ("Add.\n\n2 and 3", "5"),
        ("Say hi.", "hi"),
    ]
    assert [{k: r[k] for k in ALPACA[0]} for r in rows] == ALPACA  # and all that it had


@pytest.mark.parametrize("row", [{"completion": "5", "output": "no"}, {"output": "5"}])
def test_answers_have_their_defaults_beside_a_named_prompt(
    row: dict[str, str], tmp_path: Path
) -> None:
    path = written(tmp_path, [{"instruction": "2+3?", **row}])
    (own,) = AnswerColumns(prompt_column="instruction").read(path, "answer")
    assert (own["prompt"], own["answer"]) == ("2+3?", "5")
    (pair,) = read_data(path, "train", 1, RowOptions(prompt_column="instruction"))
    assert pair == {"prompt": "2+3?", "completion": "5"}
    (kept,) = read_rows(path, ("instruction", "answer"))  # as `route label` reads
    assert (kept["instruction"], kept["answer"]) == ("2+3?", "5")


def test_a_conversation_has_a_prompt_and_its_answer(tmp_path: Path) -> None:
    (row,) = read_rows(written(tmp_path, SHAREGPT), ("prompt", "answer"))
    assert row["messages"] == MESSAGES
    assert row["prompt"] == MESSAGES[:2] and row["answer"] == "5"
    (row,) = read_rows(written(tmp_path, [{"messages": MESSAGES}]), ("prompt", "answer"))
    assert row["prompt"] == MESSAGES[:2] and row["answer"] == "5"


@pytest.mark.parametrize("speaker", ["parrot", ["human"], {"name": "human"}, None])
def test_who_speaks_is_known_or_named_with_the_line(tmp_path: Path, speaker: Any) -> None:
    rows = [*SHAREGPT, {"conversations": [{"from": speaker, "value": "hi"}]}]
    expected = re.escape(f"line 2: a message is from {speaker!r}: give one of human")
    with pytest.raises(InvalidInput, match=expected):
        read_rows(written(tmp_path, rows))


def test_alpaca_trains_on_its_output(tokenizer: Any, tmp_path: Path) -> None:
    rows = read_data(written(tmp_path, ALPACA), "train", 1, RowOptions())
    pieces = texts(rows, tokenizer, 64).pieces
    assert tokenizer.decode(pieces[1]["input_ids"]) == "<|user|>Say hi.<|assistant|>hi<|end|>"
    plain = load_tokenizer("nano-s")
    plain.chat_template = None
    whole = plain.decode(texts(rows, plain, 999).pieces[0]["input_ids"])
    assert "### Instruction:" in whole and whole.endswith("### Response:\n5<|end|>")


def test_sharegpt_trains_on_what_the_model_says(tokenizer: Any, tmp_path: Path) -> None:
    rows = read_data(written(tmp_path, SHAREGPT), "train", 1, RowOptions())
    expected = texts([{"messages": MESSAGES}], tokenizer, 64)
    assert texts(rows, tokenizer, 64) == expected


@pytest.mark.parametrize(
    ("names", "row"),
    [
        ({"text_column": "body"}, {"text": "b"}),
        ({"prompt_column": "q", "completion_column": "a"}, {"prompt": "q?", "completion": "a."}),
        ({"prompt_column": "q"}, {"prompt": "q?", "completion": "c"}),
        ({"messages_column": "chat"}, {"messages": MESSAGES}),
    ],
    ids=["text", "pair", "one of a pair", "messages"],
)
def test_columns_that_are_named_are_the_ones_that_train(
    names: dict[str, str], row: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever else a row holds."""
    others = {"messages": [], "text": "t", "completion": "c", "body": "b", "q": "q?", "a": "a."}
    path = written(tmp_path, [{**others, "chat": SHAREGPT[0]["conversations"]}])
    assert read_data(path, "train", 1, RowOptions(**names)) == [row]  # type: ignore[arg-type]


def test_columns_of_two_kinds_are_refused() -> None:
    with pytest.raises(InvalidInput, match="and not text and messages"):
        RowOptions(text_column="a", messages_column="b").columns()
    with pytest.raises(InvalidInput, match="--prompt-column and --messages-column: give one"):
        AnswerColumns(prompt_column="a", messages_column="b").read("x.jsonl")
    with pytest.raises(InvalidInput, match="--answer-column and --messages-column: give one"):
        AnswerColumns(answer_column="a", messages_column="b").read("x.jsonl", "answer")


def test_a_column_that_is_missing_is_named_with_the_nearest(tmp_path: Path) -> None:
    path = written(tmp_path, [{"question": "a?", "reply": "b"}])
    with pytest.raises(InvalidInput, match="no column 'quest'; did you mean 'question'"):
        AnswerColumns(prompt_column="quest").read(path, "answer")
    with pytest.raises(InvalidInput, match="--prompt-column"):
        texts(read_data(path, "train", 1, RowOptions()), None, 9)
    own = AnswerColumns(prompt_column="question", answer_column="reply").read(path, "answer")
    assert own == [{"prompt": "a?", "answer": "b"}]


def test_prompts_come_from_the_column_of_conversations(tmp_path: Path) -> None:
    chats = {"prompt": "not this", "answer": "nor this", "chat": SHAREGPT[0]["conversations"]}
    path = written(tmp_path, [{**chats, "label": 1}])
    (row,) = AnswerColumns(messages_column="chat").read(path, "answer")
    assert (row["prompt"], row["answer"]) == (MESSAGES[:2], "5")
    options = ScoreOptions(scorer="x", messages_column="chat")
    assert read_prompts((), Path(path), options) == [MESSAGES[:2]]
    (row,) = read_prompt_rows(path, ("prompt", "label"), messages="chat")
    assert row["prompt"] == MESSAGES[:2] and row["label"] == 1
    (tmp_path / "open.jsonl").write_text(json.dumps({"chat": MESSAGES[:2]}))
    with pytest.raises(InvalidInput, match="row 1: no answer in 'chat': its last message is not"):
        AnswerColumns(messages_column="chat").read(str(tmp_path / "open.jsonl"), "answer")


def test_a_scorer_learns_from_any_of_them(tmp_path: Path) -> None:
    from pliant.complexity.training.run import rows_of

    rows = [{**row, "label": i} for i, row in enumerate(ALPACA)]
    learned, _ = rows_of(CPXDatasetConfig(data=written(tmp_path, rows)))
    assert learned[1] == {"prompt": "Say hi.", "label": 1}
