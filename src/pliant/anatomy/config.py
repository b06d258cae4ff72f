"""What a config says about the language model in it, layer by layer."""

from __future__ import annotations

from typing import Any

from torch import nn


def text_config(model: nn.Module) -> Any:
    """The part of the config that describes the language model; None where there is no config."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return config
    return config.get_text_config(decoder=True)


def layer_configs(config: Any, count: int) -> list[Any]:
    """A config for each layer: heterogeneous configs (Gemma 4) have one each."""
    if read(config, "is_heterogeneous"):
        return list(config.per_layer_config)
    return [config] * count


def layer_types(config: Any, count: int) -> list[str | None]:
    """What the config calls each layer (full_attention, mamba, ...); None where it does not say."""
    for name in ("layer_types", "layers_block_type"):
        types = read(config, name)
        if isinstance(types, (list, tuple)) and len(types) == count:
            return [str(kind) for kind in types]
    return [None] * count


def read(holder: Any, name: str) -> Any:
    """The attribute, or None; a heterogeneous config raises where its layers differ."""
    try:
        return getattr(holder, name, None)
    except RuntimeError:
        return None
