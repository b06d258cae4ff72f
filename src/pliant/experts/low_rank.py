"""What an expert adds to each weight, the most important ranks first, and which of them to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pliant.errors import InvalidInput
from pliant.experts.expert import layers_of
from pliant.experts.factors import Factors, factors_of


@dataclass(frozen=True, eq=False)
class Part:
    """What the experts add to one weight, the most important ranks first."""

    path: str
    """Of the module; several stacked weights may share it."""
    nesting: int
    """How deep PEFT nests it among these: the outermost is 0."""
    parameter: str
    module: nn.Module
    is_read: bool
    """Whether the model's code may use the weight without calling the module."""
    left: Tensor
    """(..., out, rank), with the change's sign and half of its size."""
    right: Tensor
    """(..., rank, in), with the other half."""
    gains: Tensor
    """(rank,): the energy that each further rank keeps; over the experts of a mixture, together."""

    @property
    def name(self) -> str:
        return self.path if self.parameter == "weight" else f"{self.path}.{self.parameter}"

    @property
    def cost(self) -> int:
        """The numbers of one rank."""
        *stack, rows, _ = self.left.shape
        return prod(stack) * (rows + self.right.shape[-1])

    def pair(self, rank: int, dtype: torch.dtype) -> Pair:
        left, right = self.left[..., :rank], self.right[..., :rank, :]
        return Pair(self, left.to(dtype), right.to(dtype))


@dataclass(frozen=True, eq=False)
class Pair:
    """The factors that are kept of a part."""

    part: Part
    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return self.left.shape[-1]

    @property
    def numbers(self) -> int:
        return self.left.numel() + self.right.numel()

    def as_saved(self) -> tuple[Tensor, Tensor]:
        """lora_A (rank, in) and lora_B (out, rank), as PEFT lays them out."""
        if self.left.dim() == 2:
            return self.right.contiguous(), self.left.contiguous()
        a_ERI, b_EOR = self.right, self.left
        if getattr(self.part.module, "is_transposed", False):  # its axes are (experts, in, out)
            a_ERI, b_EOR = self.left.mT, self.right.mT
        a = a_ERI.flatten(0, 1).contiguous()
        return a, b_EOR.permute(1, 2, 0).flatten(1).contiguous()

    def added(self) -> Tensor:
        """What it adds to the parameter, with the parameter's axes."""
        precise = torch.promote_types(self.left.dtype, torch.float32)
        update = self.left.to(precise) @ self.right.to(precise)
        return update.T if isinstance(self.part.module, Conv1D) else update


@torch.no_grad()
def parts_of(base: nn.Module) -> list[Part]:
    parts = []
    for path, layer in layers_of(base):
        change = layer.change_of(layer.active_adapters)
        if change is None or not bool(change.any()):
            continue
        factors, d = factors_of(layer, change.shape[-1]), change.detach()
        sizes = factors.values * d.to(factors.values)
        order = sizes.abs().argsort(dim=-1, descending=True, stable=True)
        gains = sizes.gather(-1, order).square()
        left, right = _balanced(factors, d)
        parts.append(
            Part(
                path=path.replace(".base_layer", ""),
                nesting=path.count(".base_layer"),
                parameter=getattr(layer, "parameter_name", "weight"),
                module=layer.base(),
                is_read=getattr(layer, "is_read", False),
                left=left.gather(-1, order[..., None, :].expand_as(left)),
                right=right.gather(-2, order[..., :, None].expand_as(right)),
                gains=gains if gains.dim() == 1 else gains.sum(0),
            )
        )
    if not parts:
        raise InvalidInput("all z are 1: the expert is the base, and there is nothing to write")
    return parts


def without(parts: list[Part], exclude: Sequence[str]) -> list[Part]:
    for name in exclude:
        if not any(f".{name}." in f".{part.name}." for part in parts):
            raise InvalidInput(f"exclude = {name!r}: the expert changes no such module")
    usable = [p for p in parts if not any(f".{name}." in f".{p.name}." for name in exclude)]
    if not usable:
        raise InvalidInput("exclude names all that the expert changes")
    return usable


def _balanced(factors: Factors, change: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors with vectors of the same length, so that neither loses digits in bf16."""
    half = (change.abs().to(factors.values) * factors.values).sqrt()
    scales = half, half / factors.divisors
    left_scale, right_scale = scales if factors.left_is_orthonormal else scales[::-1]
    sign = change.sign().to(factors.left)
    left = factors.left * (sign * left_scale)[..., None, :]
    return left, factors.right * right_scale[..., :, None]


# --- ranks ---------------------------------------------------------------------------------------


def same_ranks(parts: Sequence[Part], rank: int) -> list[int]:
    """This rank for each, or all that there is."""
    return [min(rank, int((part.gains > 0).sum())) for part in parts]


def best_ranks(parts: Sequence[Part], budget: int) -> list[int]:
    """The ranks that keep the most energy for each number.

    The ranks of a weight come in falling order of their energy, so taking the best that is left
    always takes a weight's next one.
    """
    offers = [
        (-float(gain) / part.cost, i, k)
        for i, part in enumerate(parts)
        for k, gain in enumerate(part.gains.tolist())
        if gain > 0
    ]
    ranks, left = [0] * len(parts), budget
    for _, i, k in sorted(offers):
        if ranks[i] == k and parts[i].cost <= left:
            ranks[i] += 1
            left -= parts[i].cost
    if not any(ranks):
        least = min(part.cost for part in parts)
        raise InvalidInput(f"budget = {budget:,}: one rank of the smallest weight takes {least:,}")
    return ranks
