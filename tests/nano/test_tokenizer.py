"""Any text goes in and comes out again; a frame costs one token a role."""

from hypothesis import given
from hypothesis import strategies as st

from pliant.nano.train.__main__ import build_tokenizer
from pliant.nano.train.trainer import ASSISTANT, END, PAD, USER

TOKENIZER = build_tokenizer(2048)


@given(st.text(max_size=60).filter(lambda t: "<|" not in t))
def test_any_text_comes_out_as_it_went_in(text):
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(ids) == len(text.encode())


def test_each_role_and_the_end_are_one_token():
    ids = TOKENIZER.convert_tokens_to_ids([USER, ASSISTANT, END, PAD])
    assert len(set(ids)) == 4 and TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.eos_token == END and TOKENIZER.pad_token == PAD


def test_a_conversation_has_an_end_after_each_answer():
    chat = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2"},
    ]
    text = TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == f"{USER}1+1{ASSISTANT}2{END}{USER}2+2{ASSISTANT}"
