"""A reward model's score is its own output on the text that its tokenizer's conventions ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from pliant.errors import InvalidInput, ModelNotFound
from pliant.verify import RewardModel, verifier

WORDS = ["[UNK]", "[SEP]", "<user>", "<bot>", "what", "is", "up", "not", "much", "a", "lot"]
CHAT = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }} "
    "{% endfor %}"
)


def saved(
    folder: Path, *, labels: int = 1, pairs: bool = False, chat: bool = False
) -> tuple[RewardModel, Any, Any]:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if pairs:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A [SEP]", pair="$A [SEP] $B [SEP]", special_tokens=[("[SEP]", 1)]
        )
    special = {"sep_token": "[SEP]"} if pairs else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)
    fast.chat_template = CHAT if chat else None
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=labels,
    )
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return RewardModel(str(folder), device="cpu"), model, fast


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "what is up not much"),
        ({"pairs": True}, "what is up [SEP] not much [SEP]"),
        ({"chat": True}, "<user> what is up <bot> not much"),
    ],
    ids=["one text", "pair", "chat"],
)
def test_the_score_is_the_models_own(tmp_path: Path, options: dict[str, bool], text: str) -> None:
    reward, model, _ = saved(tmp_path, **options)
    ids = torch.tensor([[WORDS.index(word) for word in text.split()]])
    with torch.inference_mode():
        expected = model(input_ids=ids).logits[0, 0].double()
    assert reward(" not much", None, "what is up") == pytest.approx(float(expected.sigmoid()))
    reward.raw = True
    assert reward(" not much", None, "what is up") == pytest.approx(float(expected))


def test_one_of_several_outputs_counts(tmp_path: Path) -> None:
    saved(tmp_path, labels=3)
    shares = [RewardModel(str(tmp_path), label=str(i))("a lot", None, "") for i in range(3)]
    assert sum(shares) == pytest.approx(1)
    assert RewardModel(str(tmp_path), label="LABEL_1")("a lot", None, "") == shares[1]
    with pytest.raises(InvalidInput, match="LABEL_0, LABEL_1, LABEL_2: give one"):
        RewardModel(str(tmp_path))("a lot")
    with pytest.raises(InvalidInput, match="did you mean 'LABEL_"):
        RewardModel(str(tmp_path), label="LABEL_l")("a lot")


def test_a_long_text_loses_its_beginning(tmp_path: Path) -> None:
    reward, _, _ = saved(tmp_path)
    short = reward("a lot", None, "is up ")
    reward.max_tokens = 4
    assert reward("a lot", None, "what what is up ") == short


def test_it_is_loaded_when_it_is_first_used(tmp_path: Path) -> None:
    reward = verifier("reward_model", model=str(tmp_path / "nowhere"))
    with pytest.raises(ModelNotFound, match="reward_model"):
        reward("a lot", None)
