"""Projections: modules that map features to features through one weight matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Projection:
    """A projection and its path; `axis` is the axis of its weight for its inputs."""

    path: str
    module: nn.Module
    inputs: int
    outputs: int
    axis: int

    @property
    def names(self) -> tuple[str, str]:
        """Its own name and its parent's, which identifies Moshi's `o_proj.linear`."""
        parent, _, leaf = self.path.rpartition(".")
        return leaf, parent.rpartition(".")[2]


def as_projection(module: nn.Module, path: str = "") -> Projection | None:
    """The module as a projection, or None. A packed weight has another shape, so the sizes are
    attributes of the module."""
    # A LoRA layer replaces the projection that it wraps: its inputs are the same, and a hook on it
    # covers both branches.
    inner = module
    while isinstance(wrapped := getattr(inner, "base_layer", None), nn.Module):
        inner = wrapped
    if isinstance(inputs := getattr(inner, "in_features", None), int) and isinstance(
        outputs := getattr(inner, "out_features", None), int
    ):
        return Projection(path, module, inputs, outputs, axis=1)
    # transformers' Conv1D (GPT-2) has a transposed weight.
    if isinstance(inputs := getattr(inner, "nx", None), int) and isinstance(
        outputs := getattr(inner, "nf", None), int
    ):
        return Projection(path, module, inputs, outputs, axis=0)
    return None


def projections(root: nn.Module, path: str = "") -> Iterator[Projection]:
    """Every projection below `root`, in order of registration."""
    for name, child in root.named_children():
        child_path = f"{path}.{name}" if path else name
        if (projection := as_projection(child, child_path)) is not None:
            yield projection
        else:
            yield from projections(child, child_path)
