"""Growing a Llama: a larger model that computes the same function as the smaller one.

So the large model starts with all that the small one has learned. Width doubles by stacking: the
residual stream becomes [h, h], and every head and MLP channel is duplicated. Noise that cancels
breaks the symmetry of the two halves: [W/2 + N, W/2 - N] [h, h] = W h for any N. New layers write
nothing at first (their output projections are 0), so depth does not change the output either.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

_NOISE = 0.5  # of a matrix's own standard deviation; without it both halves have equal gradients


@torch.no_grad()
def widen(small: LlamaForCausalLM, seed: int = 0) -> LlamaForCausalLM:
    """The same function with twice the width, heads and MLP channels."""
    config = small.config.__class__(
        **small.config.to_dict()
        | {
            "hidden_size": 2 * small.config.hidden_size,
            "intermediate_size": 2 * small.config.intermediate_size,
            "num_attention_heads": 2 * small.config.num_attention_heads,
            "num_key_value_heads": 2 * small.config.num_key_value_heads,
            "head_dim": small.config.head_dim,
        }
    )
    large = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for ours, theirs in zip(large.model.layers, small.model.layers, strict=True):
        for name, matrix in theirs.named_parameters():
            doubled = _stacked(matrix) if matrix.ndim == 1 else _doubled(matrix, generator)
            ours.get_parameter(name).copy_(doubled)
    embeddings = small.model.embed_tokens.weight
    large.model.embed_tokens.weight.copy_(torch.cat([embeddings, embeddings], dim=1))
    # The head is the embedding again, so [h, h] would score every token twice as high.
    large.model.norm.weight.copy_(_stacked(small.model.norm.weight) / 2)
    return large


@torch.no_grad()
def deepen(model: LlamaForCausalLM, layers: int, seed: int = 0) -> LlamaForCausalLM:
    """The same function with `layers` more layers, spread evenly among the old ones."""
    old = len(model.model.layers)
    torch.manual_seed(seed)
    config = model.config.__class__(**model.config.to_dict() | {"num_hidden_layers": old + layers})
    deep = LlamaForCausalLM(config)
    deep.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
    deep.model.norm.weight.copy_(model.model.norm.weight)
    origins = _spread(old, layers)
    for layer, origin in zip(deep.model.layers, origins, strict=True):
        if origin is None:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
        else:
            layer.load_state_dict(model.model.layers[origin].state_dict())
    return deep


def _spread(old: int, new: int) -> list[int | None]:
    """The old layer that each layer copies (None: a new layer), new ones evenly among the old."""
    after = [round((i + 1) * old / new) - 1 for i in range(new)] if new else []
    origins: list[int | None] = []
    for i in range(old):
        origins.append(i)
        origins.extend([None] * after.count(i))
    return origins


def _stacked(vector: Tensor) -> Tensor:
    return torch.cat([vector, vector])


def _doubled(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """Duplicate the rows; split each row's input weights over the two equal halves of the input."""
    rows = torch.cat([matrix, matrix])
    noise = torch.randn(rows.shape, generator=generator) * (_NOISE * matrix.std())
    return torch.cat([rows / 2 + noise, rows / 2 - noise], dim=1)
