"""What Pliant can do with one model, from its config alone, without its weights."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pliant.anatomy import Anatomy
from pliant.anatomy.blocks import projections
from pliant.anatomy.config import read
from pliant.anatomy.depth import cache_name
from pliant.errors import UnsupportedModel
from pliant.survey.capability import CAPABILITIES, Specimen, ask, by_part

BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}
CPX_ROWS, CPX_LABELS = 4, 1


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, heads and bytes, by kind."""

    parameters: int
    embedding_parameters: int
    """Of the embeddings, and of the head if it is not tied to them."""
    layer_parameters: tuple[int, ...]
    bytes: dict[str, int]
    """Of all weights, by precision; int8 and int4 without their scales."""
    vocabulary: int
    hidden_size: int
    layers: int
    attention_layers: int
    heads: tuple[int, ...]
    """The distinct numbers of heads; the same below for key heads."""
    kv_heads: tuple[int, ...]
    cache_bytes_per_token: int
    """Keys and values in bf16, while no sliding window is full."""
    state_bytes: int
    """Recurrent and convolutional states of one sequence, in bf16."""


@dataclass(frozen=True)
class Estimate:
    """Memory that a part would add, by a formula; nothing is allocated."""

    part: str
    what: str
    bytes: int
    formula: str


@dataclass(frozen=True)
class Finding:
    """One capability's answer for one model."""

    part: str
    name: str
    question: str
    ok: bool
    reason: str


@dataclass(frozen=True)
class Examination:
    """Sizes from the shapes, capabilities measured on a tiny copy, memory by a formula."""

    model_type: str
    architecture: str
    transformers_version: str
    sizes: Sizes | None
    """None if the layers are unknown: the finding "layers" says why."""
    findings: tuple[Finding, ...]
    estimates: tuple[Estimate, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        yes = sum(finding.ok for finding in self.findings)
        return f"{self.architecture} has {yes} of {len(self.findings)} capabilities."


def examine(config: PreTrainedConfig, questions: Collection[str] | None = None) -> Examination:
    """Examine the causal LM that this config describes, whatever its size; with `questions`, only
    these are asked, and those that they need."""
    model = without_weights(config)
    sizes: Sizes | None = None
    estimates: tuple[Estimate, ...] = ()
    try:
        anatomy = Anatomy.of(model)
    except UnsupportedModel:
        pass  # the finding "layers" says why
    else:
        sizes = sizes_of(anatomy)
        estimates = estimates_of(anatomy, sizes)
    asked = [c for c in CAPABILITIES if c.name in _with_needs(questions)]
    answers = ask(Specimen(config), asked)
    return Examination(
        model_type=config.model_type,
        architecture=type(model).__name__,
        transformers_version=transformers.__version__,
        sizes=sizes,
        findings=tuple(
            Finding(c.part, c.name, c.question, answers[c.name].ok, answers[c.name].reason)
            for c in by_part()
            if c.name in answers
        ),
        estimates=estimates,
    )


def _with_needs(questions: Collection[str] | None) -> set[str]:
    """These, and what they need; all, if none are named."""
    needs = {c.name: c.needs for c in CAPABILITIES}
    names, new = set[str](), set(needs if questions is None else questions)
    while new:
        names |= new
        new = {need for name in new for need in needs[name]} - names
    return names


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device, which takes no memory."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        raise UnsupportedModel(
            f"a model of type {config.model_type!r} is no causal language model: transformers "
            f"{transformers.__version__} maps no AutoModelForCausalLM to it."
        )
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except Exception as error:  # a model's constructor may raise anything
        message = " ".join(str(error).split())[:300]
        raise UnsupportedModel(
            f"transformers {transformers.__version__} cannot build a {config.model_type!r} model "
            f"from this config: {type(error).__name__}: {message}"
        ) from error


def sizes_of(anatomy: Anatomy) -> Sizes:
    """The sizes of a model, which may be on the meta device."""
    total = _parameters(anatomy.model)
    count = len(anatomy.layers)
    blocks = [block for i in range(count) for block in anatomy.attentions(i)]
    per_token, state = cache_numbers(anatomy)
    table: Any = anatomy.embeddings
    return Sizes(
        parameters=total,
        embedding_parameters=_parameters(*filter(None, [anatomy.embeddings, anatomy.head])),
        layer_parameters=tuple(_parameters(layer) for layer in anatomy.layers),
        bytes={name: math.ceil(total * size) for name, size in BYTES.items()},
        vocabulary=int(
            getattr(table, "num_embeddings", 0) or read(anatomy.config, "vocab_size") or 0
        ),
        hidden_size=anatomy.hidden_size,
        layers=count,
        attention_layers=sum(anatomy.attention(i) is not None for i in range(count)),
        heads=tuple(sorted({block.heads for block in blocks})),
        kv_heads=tuple(sorted({block.kv_heads for block in blocks})),
        cache_bytes_per_token=2 * per_token,
        state_bytes=2 * state,
    )


def estimates_of(anatomy: Anatomy, sizes: Sizes) -> tuple[Estimate, ...]:
    """What each part would add, in bytes, with the formula."""
    blocks = [b for i in range(sizes.layers) for b in anatomy.attentions(i)]
    gates = sum(block.heads for block in blocks) + sizes.layers
    matrices = [p for layer in anatomy.layers for p in projections(layer)]
    ranks = [min(p.inputs, p.outputs) for p in matrices]
    rows, d, labels = CPX_ROWS, sizes.hidden_size, CPX_LABELS
    cpx = f"({rows} rows x {d} + {d} x {labels} label) x 4 bytes"
    gate = f"({gates - sizes.layers} heads + {sizes.layers} layers) x 4 bytes"
    expert = f"sum of min(in, out) over {len(ranks)} projections x 4 bytes"
    basis = f"sum of min(in, out)^2 over {len(ranks)} projections, in bf16"
    squares = sum(rank * rank for rank in ranks)
    stored = "stored keys and values, for each token of a batch"
    per_token = sizes.cache_bytes_per_token
    return (
        Estimate("complexity", "the [CPX] rows and the score head", 4 * d * (rows + labels), cpx),
        Estimate("structure", "a gate for every head and layer", 4 * gates, gate),
        Estimate("experts", "one expert on every projection", 4 * sum(ranks), expert),
        Estimate("experts", "the bases that all experts share", 2 * squares, basis),
        Estimate("gradients", stored, per_token, "the cache of one token, in bf16"),
    )


@torch.no_grad()
def cache_numbers(anatomy: Anatomy) -> tuple[int, int]:
    """How many numbers a cache holds for each token, and how many at any length.

    On the meta device the decoder's own forward costs nothing and returns a cache of shapes. If it
    cannot run there, the heads of keys and values tell the numbers.
    """
    embedded = next(anatomy.embeddings.parameters())
    if embedded.is_meta:
        ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
        try:
            output = anatomy.decoder(input_ids=ids, use_cache=True)
            return _cache_size(getattr(output, cache_name(output) or ""), tokens=2)
        except Exception:
            pass  # some forwards need the values of tensors
    return _cache_by_formula(anatomy), 0


def _cache_size(cache: Any, tokens: int) -> tuple[int, int]:
    per_token = state = 0
    for layer in cache.layers:
        for name, value in vars(layer).items():
            if name in ("keys", "values"):
                per_token += _numbers(value) // tokens
            else:
                state += _numbers(value)
    return per_token, state


def _numbers(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() if value.dim() > 1 else 0  # a position is no state
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_numbers, value)) if isinstance(value, (list, tuple)) else 0


def _cache_by_formula(anatomy: Anatomy) -> int:
    """Keys as wide as values; layers that share another layer's keys (Gemma 3n) store none."""
    storing = len(anatomy.layers) - (read(anatomy.config, "num_kv_shared_layers") or 0)
    blocks = [block for i in range(storing) for block in anatomy.attentions(i)]
    return sum(2 * block.kv_heads * block.head_dim for block in blocks)


def _parameters(*modules: nn.Module) -> int:
    """The number of weights; tied ones count once."""
    distinct = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.numel() for p in distinct.values())
