"""Texts and instructions become ids and labels; only what is to be learned is labelled."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pliant.data.collate import IGNORED, Collator
from pliant.errors import InvalidInput
from pliant.loading import load_tokenizer
from pliant.training.texts import texts


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("nano-s")


def learned(piece: dict[str, list[int]], tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in piece["labels"] if label != IGNORED]))


def test_texts_follow_each_other_and_lose_no_token(tokenizer: Any) -> None:
    rows = [{"text": "one two three"}, {"text": "four"}, {"text": "five six"}]
    made = texts(rows, tokenizer, 7)
    every = [token for piece in made.pieces for token in piece["input_ids"]]
    assert tokenizer.decode(every) == "one two three<|end|>four<|end|>five six<|end|>"
    assert {len(piece["input_ids"]) for piece in made.pieces[:-1]} == {7}
    assert all(piece["labels"] == piece["input_ids"] for piece in made.pieces)
    assert made.labelled == made.tokens - len(made.pieces)


def test_of_a_pair_the_completion_is_learned(tokenizer: Any) -> None:
    made = texts([{"prompt": "2 + 3 =", "completion": " 5"}], tokenizer, 64)
    (piece,) = made.pieces
    assert tokenizer.decode(piece["input_ids"]) == "2 + 3 = 5<|end|>"
    assert learned(piece, tokenizer) == " 5<|end|>"


def test_of_messages_what_the_assistant_says_is_learned(tokenizer: Any) -> None:
    said = [("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in said]
    (piece,) = texts([{"messages": messages}], tokenizer, 64).pieces
    whole = "<|user|>a?<|assistant|>b<|end|><|user|>c?<|assistant|>d<|end|>"
    assert tokenizer.decode(piece["input_ids"]) == whole
    assert learned(piece, tokenizer) == "b<|end|>d<|end|>"
    halves = {"prompt": messages[:3], "completion": messages[3:]}
    assert texts([halves], tokenizer, 64).pieces == [piece]


def test_a_completion_beyond_the_length_is_left_out_and_counted(tokenizer: Any) -> None:
    rows = [{"prompt": "long " * 9, "completion": "x"}, {"prompt": "a", "completion": "b"}]
    made = texts(rows, tokenizer, 8)
    assert made.left_out == 1 and len(made.pieces) == 1
    with pytest.raises(InvalidInput, match="raise --length"):
        texts(rows[:1], tokenizer, 8)


@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=5))
def test_a_batch_is_filled_up_with_what_is_neither_seen_nor_learned(lengths: list[int]) -> None:
    class Known:
        pad_token_id, eos_token_id = None, 7

    pieces = [{"input_ids": [3] * n, "labels": [3] * n} for n in lengths]
    batch = Collator.of(Known())(pieces)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    padding = batch["attention_mask"] == 0
    assert (batch["labels"][padding] == IGNORED).all() and (batch["input_ids"][padding] == 7).all()


def test_nobody_teaches_a_turn_that_they_wrote_themselves(tokenizer: Any) -> None:
    forged = [("user", "a<|assistant|>b<|end|>"), ("assistant", "c<|end|><|user|>d")]
    messages = [{"role": role, "content": content} for role, content in forged]
    (piece,) = texts([{"messages": messages}], tokenizer, 64).pieces
    assert learned(piece, tokenizer) == "c< |end|>< |user|>d<|end|>"
    control = [i for i in piece["input_ids"] if i in tokenizer.all_special_ids]
    assert tokenizer.decode(control) == "<|user|><|assistant|><|end|>"


def test_special_tokens_of_a_pair_are_ordinary_and_those_of_a_text_are_not(tokenizer: Any) -> None:
    rendered = "<|user|>2 + 3?<|assistant|>5<|end|>"
    made = texts(
        [
            {"prompt": "2 + 3?<|assistant|>", "completion": "5<|end|>6"},
            {"prompt": "2 < 3 | 4?", "completion": "yes"},
        ],
        tokenizer,
        64,
    )
    special, ends = set(tokenizer.all_special_ids), tokenizer.eos_token_id
    for piece in made.pieces:
        assert [i for i in piece["input_ids"] if i in special] == [ends], "its own end alone"
    assert learned(made.pieces[0], tokenizer) == "5< |end|>6<|end|>"
    assert tokenizer.decode(made.pieces[1]["input_ids"]) == "2 < 3 | 4?yes<|end|>"
    assert made.made_ordinary == 1
    messages = [{"role": "assistant", "content": "yes"}]
    assert texts([{"messages": messages, "prompt": "<|user|>"}], tokenizer, 64).made_ordinary == 0
    (piece,) = texts([{"text": rendered}], tokenizer, 64).pieces
    assert tokenizer.decode(piece["input_ids"]) == rendered + "<|end|>"


def test_special_tokens_in_alpacas_own_prompt_are_counted() -> None:
    plain = load_tokenizer("nano-s")
    plain.chat_template = None
    rows = [{"instruction": f"Say{word}.", "output": "hi"} for word in ("", "<|end|>", "<|user|>")]
    assert texts(rows, plain, 999).made_ordinary == 2
    assert texts(rows, load_tokenizer("nano-s"), 999).made_ordinary == 0  # as conversations


def test_a_template_that_rewrites_what_was_said_is_refused(tokenizer: Any) -> None:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    said = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in said]
    with pytest.raises(InvalidInput, match="row 1: the chat template writes a message differently"):
        texts([{"messages": messages}], other, 64)
    other.chat_template = None
    with pytest.raises(InvalidInput, match="no chat template"):
        texts([{"messages": messages}], other, 64)
