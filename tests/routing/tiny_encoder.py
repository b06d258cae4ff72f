"""A sentence encoder that needs no download: random weights, and letters as its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

WIDTH, POSITIONS = 16, 24


def write_encoder(folder: Path, seed: int = 0, **tokenizer: Any) -> Path:
    """A random BERT with a vocabulary of letters and digits, as a stock folder."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["total", "times", "prove", "spell", "and", "please", "these"]
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789,;:")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters]
    pieces += [f"##{letter}" for letter in letters]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2}
    config = BertConfig(
        vocab_size=len(pieces),
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
        **sizes,
    )
    torch.manual_seed(seed)
    BertModel(config).save_pretrained(folder)
    vocabulary = str(folder / "vocab.txt")
    BertTokenizerFast(vocabulary, **tokenizer).save_pretrained(folder)
    return folder
