"""Which experts each row of a batch uses, and with which weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pliant.errors import InvalidInput, UnsupportedModel, did_you_mean

Mixture = Mapping[str, float | Sequence[float]]
"""The coefficient of each expert's d = z - 1, or one for each layer; {} is the base."""
BASE = "__base__"
"""The name that stands for the base, as in PEFT's `adapter_names`."""


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
    def of_mixtures(cls, mixtures: Sequence[Mixture], known: Sequence[str]) -> Rows:
        """A mixture a row, as expert -> coefficient, or expert -> a coefficient for each layer."""
        if not mixtures:
            raise InvalidInput("there are no rows: give a mixture of experts for each row")
        names = tuple(dict.fromkeys(name for mixture in mixtures for name in mixture))
        for name in names:
            if name not in known:
                raise InvalidInput(f"no expert {name!r}{did_you_mean(name, known)}")
        values = [
            torch.as_tensor(m.get(n, 0.0), dtype=torch.float32) for m in mixtures for n in names
        ]
        depths = {value.shape[0] for value in values if value.dim()}
        if len(depths) > 1 or any(value.dim() > 1 for value in values):
            raise InvalidInput(
                f"the mixtures have coefficients for {sorted(depths)} layers: give one for all "
                "layers, or one for each, in the same number everywhere"
            )
        if not values or not depths:
            return cls(names, torch.tensor(values).view(len(mixtures), len(names)))
        (depth,) = depths
        weights = torch.stack([value.expand(depth) for value in values], dim=1)
        return cls(names, weights.view(depth, len(mixtures), len(names)))

    def at(self, layer: int | None) -> Tensor:
        """(rows, names): the coefficients in this layer; outside of all layers, their mean."""
        if self.weights.dim() == 2:
            return self.weights
        return self.weights.mean(0) if layer is None else self.weights[layer]

    def change(
        self, changes: Mapping[str, Tensor], shape: Sequence[int], layer: int | None
    ) -> Tensor:
        """(rows, *shape): the mixture of every row in one matrix's d."""
        weights = self.at(layer)
        out = torch.zeros(weights.shape[0], *shape)
        for k, name in enumerate(self.names):
            if name in changes:
                change = changes[name].detach().float()
                out = out.to(change.device)
                scale = weights[:, k].to(change.device).view(-1, *[1] * change.dim())
                out[..., : change.shape[-1]] += scale * change
        return out

    def groups(
        self, names: Collection[str], layer: int | None
    ) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The rows whose mixtures of these experts are the same, and the mixture of each group.

        A mixture has no entry for a coefficient of 0.
        """
        columns = [k for k, name in enumerate(self.names) if name in names]
        weights = self.at(layer)[:, columns]
        if not columns:
            return [(torch.arange(len(weights)), {})]
        _, group_of = weights.detach().unique(dim=0, return_inverse=True)
        groups = []
        for group in range(int(group_of.max()) + 1):
            members = (group_of == group).nonzero().flatten()
            first = weights[members[0]]
            mixture = {
                self.names[k]: first[i]
                for i, k in enumerate(columns)
                if first.requires_grad or bool(first[i])
            }
            groups.append((members, mixture))
        return groups

    def row_of(self, like: Tensor, what: str, stacked: int = 1) -> Tensor:
        """The row to which each entry of the first axis belongs; an entry is a row or a token.

        A batch may hold several copies of each row, one after the other, as beam search does.
        """
        rows = self.weights.shape[-2]
        batch, length = self.batch if self.batch[0] else like.shape[:2]
        if batch % rows:
            raise InvalidInput(f"there are experts for {rows} rows, and the batch has {batch}")
        row_of = torch.arange(rows, device=like.device).repeat_interleave(batch // rows)
        if like.shape[0] == batch:
            return row_of
        if like.shape[0] == batch * length:
            return row_of.repeat_interleave(length)
        if like.shape[0] == stacked * batch * length:  # every expert of a mixture sees all tokens
            return row_of.repeat_interleave(length).repeat(stacked)
        raise UnsupportedModel(
            f"{what} is called with a tensor of shape {tuple(like.shape)} for {batch} rows of "
            f"{length} tokens, so its entries cannot be assigned to rows: use one expert for the "
            "whole batch"
        )

    def beside(self, change_RK: Tensor, like: Tensor, what: str) -> Tensor:
        """Each row's values (rows, K), expanded to multiply `like` (..., features).

        Some models flatten rows and tokens into one axis.
        """
        values = change_RK.to(like.dtype)[self.row_of(like, what)]
        return values.view(len(values), *[1] * (like.dim() - 2), -1)
