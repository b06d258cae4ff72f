"""Tiny models of the architectures in the seed's table, and others of a special shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pliant.anatomy.tiny import tiny_config, tiny_model
from pliant.loading import load_tokenizer

ARCHITECTURES = {
    "gpt2": "GPT2",
    "opt": "OPT",
    "bloom": "Bloom",
    "gpt_neox": "GPTNeoX",
    "llama": "Llama",
}
"""Model types, and their names in a table; Pythia is a GPT-NeoX."""

IDS = torch.randint(5, 95, (2, 12), generator=torch.Generator().manual_seed(0))


def model(name: str = "llama") -> PreTrainedModel:
    return tiny_model(name)


def saved(name: str, folder: Path) -> Path:
    """A folder with a tiny model of this type and a tokenizer that fits it."""
    tokenizer = load_tokenizer("nano-s")
    config: Any = tiny_config(name)
    config.vocab_size, config.eos_token_id, config.bos_token_id = 264, 257, 256
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    output: Tensor = model(input_ids=ids, use_cache=False, **inputs).logits
    return output


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
