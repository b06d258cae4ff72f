"""Which experts each row of a batch uses, and with which weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pliant.errors import InvalidInput, UnsupportedModel, did_you_mean

BASE = "__base__"
"""The name of no expert, as in PEFT's `adapter_names`."""


@dataclass
class Rows:
    """A mixture for each row: the coefficient of each expert's d = z - 1."""

    names: tuple[str, ...]
    weights: Tensor
    """(rows, names), or (layers, rows, names) with coefficients for each layer."""
    batch: tuple[int, int] = field(default=(0, 0))
    """Rows and tokens of the batch that runs."""

    @classmethod
    def of_names(cls, adapter_names: Sequence[str], known: Sequence[str]) -> Rows:
        """One expert a row, or the base."""
        return cls.of_mixtures([{} if n == BASE else {n: 1.0} for n in adapter_names], known)

    @classmethod
    def of_mixtures(cls, mixtures: Sequence[Mapping[str, float]], known: Sequence[str]) -> Rows:
        """A mixture a row, as expert -> coefficient."""
        if not mixtures:
            raise InvalidInput("there are no rows: give a mixture of experts for each row")
        names = tuple(dict.fromkeys(name for mixture in mixtures for name in mixture))
        for name in names:
            if name not in known:
                raise InvalidInput(f"no expert {name!r}{did_you_mean(name, known)}")
        weights = torch.tensor([[m.get(name, 0.0) for name in names] for m in mixtures])
        return cls(names, weights.view(len(mixtures), len(names)))

    def change(self, changes: Mapping[str, Tensor], size: int, layer: int | None) -> Tensor:
        """(rows, size): the mixture of every row in one matrix's d."""
        weights = self.weights if self.weights.dim() == 2 else self.weights[layer or 0]
        out = torch.zeros(weights.shape[0], size)
        for k, name in enumerate(self.names):
            if name in changes:
                own = changes[name].detach().float()
                out = out.to(own.device)
                out[:, : len(own)] += weights[:, k].to(own.device)[:, None] * own
        return out

    def beside(self, change_RK: Tensor, like: Tensor, what: str) -> Tensor:
        """The rows' values with the axes of `like` (..., features), in which the rows are found.

        A batch may hold several copies of each row, one after the other, as beam search does, and
        some models join rows and tokens to one axis.
        """
        rows = change_RK.shape[0]
        batch, length = self.batch if self.batch[0] else like.shape[:2]
        if batch % rows:
            raise InvalidInput(f"there are experts for {rows} rows, and the batch has {batch}")
        values = change_RK.repeat_interleave(batch // rows, dim=0).to(like.dtype)
        if like.dim() >= 3 and like.shape[0] == batch:
            return values.view(batch, *[1] * (like.dim() - 2), -1)
        if like.dim() == 2 and like.shape[0] == batch * length:
            return values.repeat_interleave(length, dim=0)
        raise UnsupportedModel(
            f"{what} is called with a tensor of shape {tuple(like.shape)} for {batch} rows of "
            f"{length} tokens, in which the rows cannot be told apart: use one expert for the "
            "whole batch"
        )
