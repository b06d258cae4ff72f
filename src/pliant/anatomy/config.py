"""A config's language model, layer by layer, and the config of its first layers alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
           "num_decoder_layers")  # fmt: skip
_INDICES = re.compile(r".*(layers|idxs|indices|layer_ids)")
_NOT_LAYERS = re.compile(r".*token.*|architectures|label.*|id2label")


def text_config(model: nn.Module) -> Any:
    """The part of the config that describes the language model; None if there is no config."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return config
    return config.get_text_config(decoder=True)


def layer_configs(config: Any, count: int) -> list[Any]:
    """A config for each layer; a heterogeneous config (Gemma 4) has one of its own for each."""
    if read(config, "is_heterogeneous"):
        return list(config.per_layer_config)
    return [config] * count


def layer_types(config: Any, count: int) -> list[str | None]:
    """The type of each layer (full_attention, mamba, ...); None if the config has no types."""
    for name in ("layer_types", "layers_block_type"):
        types = read(config, name)
        if isinstance(types, (list, tuple)) and len(types) == count:
            return [str(kind) for kind in types]
    return [None] * count


def read(holder: Any, name: str) -> Any:
    """The attribute, or None, also if a heterogeneous config raises because its layers differ."""
    try:
        return getattr(holder, name, None)
    except RuntimeError:
        return None


def truncated_config(config: PreTrainedConfig, depth: int, k: int) -> PreTrainedConfig:
    """A copy of the config for the first `k` of `depth` layers."""
    return config_of_layers(config, depth, range(k))


def config_of_layers(config: PreTrainedConfig, depth: int, remaining: Sequence[int]) -> Any:
    """A copy of the config for some of `depth` layers, in their order.

    Changes the number of layers, lists with an entry for each layer, and lists of layer indices.
    The caller must check that the model type builds those layers from it.
    """
    config = copy.deepcopy(config)
    if len(remaining) == depth:
        return config
    text: Any = config.get_text_config(decoder=True)
    for key, value in list(vars(text).items()):
        if key in _DEPTHS and value == depth:
            setattr(text, key, len(remaining))
        elif isinstance(value, (list, tuple)) and not _NOT_LAYERS.fullmatch(key):
            setattr(text, key, _select(key, value, depth, remaining))
    return config


def _select(key: str, value: Any, depth: int, remaining: Sequence[int]) -> Any:
    kind = type(value)
    if len(value) == depth:
        return kind(value[i] for i in remaining)
    if _INDICES.fullmatch(key) and all(isinstance(i, int) for i in value):
        return kind(remaining.index(i) for i in value if i in remaining)
    return value
