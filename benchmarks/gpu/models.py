"""The models of the GPU benchmark: Llamas of random weights, made on the device, or a real one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Geometry:
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    key_heads: int
    mlp: int


GEOMETRIES = {
    "tiny": Geometry(512, 64, 2, 4, 2, 128),
    "small": Geometry(4_096, 256, 4, 8, 4, 704),
    # Llama 3.2 1B with the vocabulary of Qwen, and Mistral 7B.
    "1B": Geometry(151_936, 2_048, 16, 32, 8, 8_192),
    "7B": Geometry(32_000, 4_096, 32, 32, 8, 14_336),
}


def build(settings: dict[str, Any], device: str) -> PreTrainedModel:
    """The model of a row: always the same weights for the same settings."""
    dtype = DTYPES[settings["dtype"]]
    if folder := settings.get("folder"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        return model.to(device).eval()
    torch.manual_seed(0)
    with torch.device(device), _default(dtype):
        model = LlamaForCausalLM(_config(GEOMETRIES[settings["geometry"]]))
    return model.eval()


def _config(geometry: Geometry) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=geometry.vocabulary,
        hidden_size=geometry.hidden,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.key_heads,
        intermediate_size=geometry.mlp,
        max_position_embeddings=4_096,
        tie_word_embeddings=geometry.vocabulary > 100_000,  # as in models of these sizes
        attn_implementation="sdpa",
    )


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_ids(model: PreTrainedModel, batch: int, length: int, seed: int = 1) -> Tensor:
    """(batch, length) ids; none of the first few, which are special in real models."""
    generator = torch.Generator().manual_seed(seed)
    size = model.get_input_embeddings().num_embeddings
    return torch.randint(8, size, (batch, length), generator=generator).to(model.device)


def why_no_attention(kind: str, device: str) -> str:
    """Why an attention implementation cannot be used; empty where it can."""
    if kind != "flash_attention_2":
        return ""
    if device != "cuda":
        return "flash attention 2 needs CUDA"
    return "" if is_flash_attn_2_available() else "flash-attn is not installed"


GRAPHS = 64
"""Of one layer: with and without gradient, a mask, a scorer's rows, ... Beyond torch's 8 the layers
would run uncompiled, and be timed so."""


def compiled(model: PreTrainedModel, settings: dict[str, Any]) -> nn.Module:
    """The model, compiled as a row's settings say.

    By layers, in place: tokens are selected between layers, where graphs would break. Adapters must
    be attached before the first run: the compiler does not notice hooks that come later.
    """
    if "compiled" not in settings:
        return model
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = GRAPHS
    options: dict[str, Any] = {"backend": settings["backend"]}
    options["disable"] = settings.get("disable", False)
    if settings["compiled"] == "model":
        whole: nn.Module = torch.compile(model, **options)
        return whole
    for layer in model.get_decoder().layers:
        layer.compile(**options)
    return model


def graphs() -> dict[str, int]:
    """What the compiler made of the calls until now: many breaks explain a slow row."""
    counters = torch._dynamo.utils.counters
    stats = counters["stats"]["unique_graphs"]
    return {"graphs": int(stats), "breaks": int(sum(counters["graph_break"].values()))}
