"""Context managers: eval mode, gradient checkpointing off, another attention implementation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put all modules in eval mode inside the block, and restore each one's mode after it.

    In train mode dropout makes every run differ, and gradient checkpointing drops the cache.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def checkpointed(model: nn.Module) -> list[Any]:
    """The modules for which transformers' gradient checkpointing is on."""
    return [m for m in model.modules() if vars(m).get("gradient_checkpointing") is True]


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[bool]:
    """Turn transformers' gradient checkpointing off inside the block; yields whether it was on.

    Checkpointing drops the keys and values that a second pass, or a step on the cache, needs.
    """
    # vars, since a wrapper forwards attributes of its model.
    checkpointing = checkpointed(model)
    for module in checkpointing:
        module.gradient_checkpointing = False
    try:
        yield bool(checkpointing)
    finally:
        for module in checkpointing:
            module.gradient_checkpointing = True


@contextmanager
def attention_among(model: nn.Module, *allowed: str) -> Iterator[None]:
    """Use the first of the `allowed` attention implementations inside the block, unless the model
    uses one of them already."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    configs: list[Any] = list({id(c): c for c in (config, text) if c is not None}.values())
    before = [getattr(c, "_attn_implementation", None) for c in configs]
    try:
        for c, implementation in zip(configs, before, strict=True):
            if implementation is not None and implementation not in allowed:
                c._attn_implementation = allowed[0]
        yield
    finally:
        for c, implementation in zip(configs, before, strict=True):
            if implementation is not None and c._attn_implementation != implementation:
                c._attn_implementation = implementation


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Run the experts of a mixture one after the other inside the block, as plain matrix products.

    A grouped product is one operation, in which a counter of operations does not look.
    """
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config(decoder=True) if config is not None else None
    before = getattr(text, "_experts_implementation", None)
    if before is None:
        yield
        return
    text._experts_implementation = "eager"
    try:
        yield
    finally:
        text._experts_implementation = before
