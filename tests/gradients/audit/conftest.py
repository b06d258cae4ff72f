"""A tiny model with something to learn, and rows to learn it from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = 24


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def rows_like(count: int, length: int = 24) -> list[dict[str, Any]]:
    """Rows that count up from a random start, in steps of 1: soon learned."""
    starts = torch.randint(0, WORDS, (count, 1))
    ids = (starts + torch.arange(length)) % WORDS
    return [{"input_ids": row.tolist()} for row in ids]


def batch_like(rows: int = 4, length: int = 16) -> dict[str, Any]:
    ids = torch.randint(0, WORDS, (rows, length))
    return {"input_ids": ids, "labels": ids.clone()}
