"""A projection with experts: Linear, GPT-2's Conv1D, and what quantisation makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pliant.errors import InvalidInput
from pliant.experts.basis import side_of
from pliant.experts.config import SVFConfig
from pliant.experts.dequantised import dequantised_weight
from pliant.experts.folded import FoldedLinear, folded
from pliant.experts.layer import SVFLayer
from pliant.experts.rows import Rows


class SVFLinear(nn.Module, SVFLayer):
    """A projection (Linear, Conv1D, or quantised) whose singular values experts scale."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SVFConfig) -> None:
        super().__init__()
        self._start(base_layer, config.exact_limit)
        self.is_conv1d = isinstance(self.base(), Conv1D)
        self.rows: Rows | None = None
        self.is_read = False
        self._row_change: Tensor | None = None
        self._spread_for: Any = None
        self._spread_rows = torch.empty(0)
        self._views: tuple[Any, Any, Any] = (None, None, None)
        self.side = side_of(*self._shape())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    @property
    def weight(self) -> Tensor:
        """The base's weight. Where the model's code may use it without calling the projection, as
        in a recurrent mixer (`is_read`), it has the active experts in it."""
        weight: Tensor = self.base().weight
        if not self.is_read or self.is_quantised:
            return weight
        if self.disable_adapters or self.merged:
            if self.disable_adapters and self.merged:
                self.unmerge()
            return weight
        change = self.change_of(self.active_adapters)
        if self.rows is not None and self._row_change is not None:
            raise InvalidInput(
                "this model uses a projection's weight without calling it, which all rows of a "
                "batch share: use one expert for the whole batch"
            )
        if change is None or self.rows is not None:
            return weight
        return self._in_place(folded(self.own_weight(), self.vectors_for(change), change))

    def _parameter(self) -> nn.Parameter:
        parameter: nn.Parameter = self.base().weight
        return parameter

    def _shape(self) -> tuple[int, ...]:
        base: Any = self.base()
        return (base.nf, base.nx) if self.is_conv1d else (base.out_features, base.in_features)

    def own_weight(self) -> Tensor:
        base = self.base()
        if self.is_quantised:
            return dequantised_weight(base)
        weight: Tensor = base.weight
        return weight.T if self.is_conv1d else weight

    def _in_place(self, weight_OI: Tensor) -> Tensor:
        return weight_OI.T if self.is_conv1d else weight_OI

    def _fold(self, weight: Tensor, change: Tensor) -> Tensor:
        result = super()._fold(weight, change)
        return result.T.contiguous().T if self.is_conv1d else result

    # --- rows ------------------------------------------------------------------------------------

    def use_rows(self, rows: Rows | None) -> None:
        """Give each row of the next batches its experts; None: all rows use the active ones."""
        self.rows, self._row_change, self._spread_for = rows, None, None
        if rows is not None and any(name in self.svf_z for name in rows.names):
            size = max(self.ranks[name] for name in rows.names if name in self.svf_z)
            with torch.set_grad_enabled(rows.weights.requires_grad):
                self._row_change = rows.change(self.changes(), (size,), self.layer_index)

    # --- forward ---------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.rows is not None:
            if self.merged_adapters:
                raise InvalidInput("unmerge the experts before each row uses its own")
            if self._row_change is None:
                return self.base_layer(x, *args, **kwargs)
            return self._delta(x, self._row_change, args, kwargs)
        change = None if self.merged_adapters else self.change_of(self.active_adapters)
        if change is None:
            return self.base_layer(x, *args, **kwargs)
        if not args and not kwargs and self.folds(change) and self._is_plain():
            weight = self.folded_weight(change)
            if weight is not None:
                vectors = self.vectors_for(change)
                return FoldedLinear.apply(x, change, weight, self._bias(), vectors, self.is_conv1d)
        return self._delta(x, change, args, kwargs)

    def _is_plain(self) -> bool:
        """Whether the base runs the forward that the folded form repeats."""
        base = self.base_layer
        if "forward" in vars(base) or base._forward_hooks or base._forward_pre_hooks:
            return False
        return type(base).forward in (nn.Linear.forward, Conv1D.forward)

    def _bias(self) -> Tensor | None:
        return getattr(self.base(), "bias", None)

    def _delta(
        self, x: Tensor, change: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor:
        """The base's output and the experts' effect on it, whatever the base's weight is."""
        if self.side == "input":
            return self.base_layer(self._with_effect(x, x, change), *args, **kwargs)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        bias = self._bias()
        return self._with_effect(y, y if bias is None else y - bias, change)

    def _with_effect(self, to: Tensor, h: Tensor, change: Tensor) -> Tensor:
        """to + V diag(d) V^T h"""
        vectors, transposed = self._factors(change.shape[-1])
        if h.dtype != vectors.dtype:
            h = h.to(vectors.dtype)
        along = h @ vectors
        along = along * (change.to(along.dtype) if self.rows is None else self._spread(along))
        if to.dtype != vectors.dtype:
            return to + (along @ transposed).to(to.dtype)
        side, rank = vectors.shape
        return torch.addmm(to.reshape(-1, side), along.view(-1, rank), transposed).view(to.shape)

    def _factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """V and V^T of the first `rank` singular values; the views are cached, because making them
        takes a noticeable part of a generation step."""
        if torch.compiler.is_compiling():
            vectors = self.ensure_basis()[..., :rank]
            return vectors, vectors.mT
        basis = self.svf_basis
        key = (basis.data_ptr(), basis.shape, rank)
        if self._views[0] != key or basis.numel() == 0:
            vectors = self.ensure_basis()[..., :rank]
            key = (self.svf_basis.data_ptr(), self.svf_basis.shape, rank)
            self._views = (key, vectors, vectors.mT)
        return self._views[1], self._views[2]

    def _spread(self, along: Tensor) -> Tensor:
        """Each row's change, shaped for this batch; cached over the steps of a generation."""
        assert self.rows is not None and self._row_change is not None
        key = (self.rows.batch, along.shape[:-1], along.dtype)
        if self._spread_for != key or self._row_change.requires_grad:
            name = type(self.base()).__name__
            self._spread_rows = self.rows.beside(self._row_change, along, name)
            self._spread_for = key
        return self._spread_rows

    def __repr__(self) -> str:
        return "svf." + super().__repr__()
