"""A layer's MLP: its down projection, whose inputs are the MLP's channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from pliant.anatomy.attention import Absent
from pliant.anatomy.projection import Projection, projections


@dataclass(frozen=True)
class Mlp:
    """Channel c is input c of `down`; `axis` is the axis of `down.weight` for its inputs."""

    down: nn.Module
    down_name: str
    width: int
    axis: int


# Names are hints: a projection must also narrow to the hidden size what another one widened.
DOWN_NAMES = (
    "down_proj", "fc2", "dense_4h_to_h", "c_proj", "w2", "fc_out", "lin2", "Wo", "w_out",
    "output_linear", "proj_down", "layer_2", "dense", "output", "value", "2",
)  # fmt: skip


def find_mlp(
    layer: nn.Module, hidden_size: int, attention: tuple[str, ...], named: str | None = None
) -> tuple[Mlp, ...] | Absent:
    """The dense MLPs of one layer, nearly always one.

    `attention` are the paths of the attention's outputs. `named` is the path of the down projection
    in the layer, or the end of it, if the user names it.
    """
    candidates = list(projections(layer))
    if named is not None:
        chosen = [p for p in candidates if f".{p.path}".endswith(f".{named}")]
        return tuple(map(_as_mlp, chosen)) or Absent(f"no projection named {named}")
    mixtures = list(_mixtures(layer))
    # A gated norm (A.X K2) narrows and widens the hidden state as well, but is no MLP.
    dense = [p for p in candidates if not _below(p.path, mixtures) and "norm" not in p.path]
    downs = [
        p
        for p in dense
        if p.path not in attention
        and set(p.names) & set(DOWN_NAMES)
        and p.outputs == hidden_size
        and any(_widens(up, p) for up in dense)
    ]
    if downs:
        widest = max(p.inputs for p in downs)
        return tuple(_as_mlp(p) for p in downs if p.inputs == widest)
    if mixtures:
        return Absent("its MLP is a mixture of experts: no single projection narrows it")
    return Absent("nothing in it widens the hidden state and narrows it again")


def _widens(up: Projection, down: Projection) -> bool:
    """Whether `up` makes the inputs of `down`: as many, or twice as many with a gate."""
    return (
        up.path != down.path
        and up.inputs == down.outputs
        and up.outputs in (down.inputs, 2 * down.inputs)
        and up.path.split(".")[0] in (down.path.split(".")[0], *_flat_names(down))
    )


def _flat_names(down: Projection) -> tuple[str, ...]:
    """Up projections of BERT and BART, whose MLP is no module of its own."""
    return ("intermediate", "fc1", "lin1") if down.path.count(".") <= 1 else ()


def _mixtures(layer: nn.Module) -> Iterator[str]:
    """The paths of experts, and of the blocks that route tokens to them."""
    for path, module in layer.named_modules():
        if "expert" in path.rpartition(".")[2] or "expert" in type(module).__name__.lower():
            yield path
            if parent := path.rpartition(".")[0]:
                yield parent


def _below(path: str, roots: list[str]) -> bool:
    return any(path == root or path.startswith(root + ".") for root in roots)


def _as_mlp(projection: Projection) -> Mlp:
    return Mlp(projection.module, projection.path, projection.inputs, projection.axis)
