"""A projection with experts: PEFT's layer for singular-value fine-tuning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from pliant.errors import AdapterError, InvalidInput
from pliant.experts.basis import basis_of, side_of
from pliant.experts.config import SVFConfig
from pliant.experts.folded import NEAR_ZERO, FoldedLinear, folded
from pliant.experts.rows import Rows

FOLD_ABOVE = 1 / 8
"""Of the full rank: with fewer singular values the delta form trains faster
(benchmarks/expert_speed.py)."""


class Change(nn.Module):
    """d = z - 1 for each singular value, in fp32: bf16 would lose small steps near 1."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*size, dtype=torch.float32))


class SVFLayer(BaseTunerLayer):
    """What a projection and a mixture's stacked weight share: experts, a basis, and merging."""

    base_layer: Any
    active_adapters: list[str]
    svf_basis: Tensor
    svf_z: Any
    merged_adapters: list[str]
    disable_adapters: bool
    merged: bool

    adapter_layer_names = ("svf_z",)
    other_param_names = ("ranks",)

    def _start(self, base_layer: nn.Module, exact_limit: int) -> None:
        self.base_layer = base_layer
        self.svf_z = nn.ModuleDict()
        self.svf_basis = nn.Parameter(torch.empty(0), requires_grad=False)
        self.ranks: dict[str, int] = {}
        self.missing = 0.0
        self.exact_limit = exact_limit
        self.form = "auto"
        self.layer_index: int | None = None
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters = []
        self.tied_to: tuple[SVFLayer, ...] = ()
        self._aside: Tensor | None = None
        self._folded: tuple[Any, Tensor | None] = (None, None)

    def tie_to(self, first: SVFLayer) -> None:
        """Share the experts of another module with the same weight, so that they can be merged."""
        self.tied_to = (first,)  # in a tuple, so that it is no submodule
        self.svf_z, self.ranks = first.svf_z, first.ranks

    def base(self) -> Any:
        """The module that the model came with."""
        module = self.base_layer
        while isinstance(module, BaseTunerLayer):
            module = module.base_layer
        return module

    # --- the weight, as (..., out, in) -----------------------------------------------------------

    def own_weight(self) -> Tensor:
        """The base's weight as (..., out, in), dequantised if it is quantised."""
        raise NotImplementedError

    def _parameter(self) -> nn.Parameter:
        """The base's own parameter, which merging changes."""
        raise NotImplementedError

    def _in_place(self, weight_OI: Tensor) -> Tensor:
        """A weight (..., out, in) with the axes of the parameter."""
        return weight_OI

    @property
    def is_quantised(self) -> bool:
        data = self._parameter().data
        return not data.dtype.is_floating_point or type(data) not in (Tensor, DTensor)

    # --- experts ---------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: SVFConfig) -> None:
        """Add an expert with z = 1."""
        *stack, out_features, in_features = self._shape()
        rank = min(out_features, in_features, config.rank or max(out_features, in_features))
        self.ranks[adapter_name] = rank
        self.svf_z[adapter_name] = Change(*stack, rank)
        self.form = config.form
        device = self._parameter().device
        if not self.svf_z[adapter_name].weight.is_meta and device.type != "meta":
            self.svf_z[adapter_name].to(device)
        self.set_adapter(self.active_adapters or [adapter_name])

    def _shape(self) -> tuple[int, ...]:
        return tuple(self.own_weight().shape)

    def ensure_basis(self) -> Tensor:
        """The singular vectors, computed or read from disk when they are first needed."""
        if self.tied_to:
            self.svf_basis = self.tied_to[0].ensure_basis()
            return self.svf_basis
        rank = max(self.ranks.values())
        if self.svf_basis.numel() == 0 or self.svf_basis.shape[-1] < rank:
            weight = self._aside if self._aside is not None else self.own_weight()
            basis = basis_of(weight, rank, self.exact_limit)
            self.missing = basis.missing
            dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
            vectors = basis.vectors.to(weight.device, dtype)
            self.svf_basis = nn.Parameter(vectors, requires_grad=False)
        return self.svf_basis

    def changes(self) -> dict[str, Tensor]:
        """Each expert's d."""
        return {name: change.weight for name, change in self.svf_z.items()}

    def change_of(self, names: Sequence[str]) -> Tensor | None:
        """The sum of these experts' d; None if none of them changes this projection."""
        own = [self.svf_z[name].weight for name in names if name in self.svf_z]
        if not own:
            return None
        if len(own) == 1:
            return own[0]
        size = max(d.shape[-1] for d in own)
        return torch.stack([nn.functional.pad(d, (0, size - d.shape[-1])) for d in own]).sum(0)

    def vectors_for(self, change: Tensor) -> Tensor:
        """As many singular vectors as the change has numbers."""
        return self.ensure_basis()[..., : change.shape[-1]]

    # --- merging ---------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the active experts, or these, into the weight; the weight itself is kept aside."""
        names = check_adapters_to_merge(self, adapter_names)
        change = self.change_of(names)
        if not names or change is None:
            return
        if self.is_quantised:
            raise AdapterError(
                "an expert cannot be merged into a quantised weight: load the base unquantised"
            )
        if self.tied_to:
            self.merged_adapters.extend(names)
            return
        parameter = self._parameter()
        if self._aside is None:
            self._aside = self.own_weight().detach().clone()
        change = self.change_of([*self.merged_adapters, *names])
        assert change is not None
        merged = folded(self._aside, self.vectors_for(change), change.detach())
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaN or infinity in the merged weights of {', '.join(names)}")
        parameter.data.copy_(self._in_place(merged))
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the weight that was kept aside back, bit by bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._aside is not None:
            self._parameter().data.copy_(self._in_place(self._aside))
            self._aside = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What this expert adds to the weight, with the axes of the parameter."""
        change = self.svf_z[adapter].weight.detach()
        weight = self.own_weight().float()
        return self._in_place(folded(weight, self.vectors_for(change), change) - weight)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    # --- the folded weight -----------------------------------------------------------------------

    @torch.no_grad()
    def folded_weight(self, change: Tensor) -> Tensor | None:
        """The weight with this change in it, made anew when either has changed.

        None if some singular value is scaled to about zero, for which the gradient has no form.
        """
        if self.tied_to:
            return self.tied_to[0].folded_weight(change)
        weight = self.own_weight()
        key = (change.detach().clone(), weight.data_ptr(), weight._version)
        before, made = self._folded
        if before is None or key[1:] != before[1:] or not torch.equal(key[0], before[0]):
            near_zero = bool(((1 + change).abs() < NEAR_ZERO).any())
            made = None if near_zero else self._fold(weight, change)
            self._folded = (key, made)
        return made

    def _fold(self, weight: Tensor, change: Tensor) -> Tensor:
        return folded(weight.detach(), self.vectors_for(change), change.detach())

    def folds(self, change: Tensor) -> bool:
        """Whether the folded form is used: by hand, or by itself while the expert is trained."""
        if self.form == "delta" or (self.form == "auto" and not change.requires_grad):
            return False
        if self.is_quantised or torch.compiler.is_compiling():
            return False
        if isinstance(self.svf_basis, DTensor) or isinstance(self._parameter(), DTensor):
            return False
        wide = change.shape[-1] > FOLD_ABOVE * min(self._shape()[-2:])
        return wide or self.form == "folded"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": (None, None), "_views": (None, None, None)}


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
        """The base's; in a recurrent mixer, whose code may use it without calling the projection,
        with the active experts in it."""
        own: Tensor = self.base().weight
        if not self.is_read or self.disable_adapters or self.merged or self.is_quantised:
            return own
        change = self.change_of(self.active_adapters)
        if self.rows is not None and self._row_change is not None:
            raise InvalidInput(
                "this model uses a projection's weight without calling it, which all rows of a "
                "batch share: use one expert for the whole batch"
            )
        if change is None or self.rows is not None:
            return own
        weight_OI = self.own_weight()
        made = folded(weight_OI, self.vectors_for(change), change)
        return self._in_place(made)

    def _parameter(self) -> nn.Parameter:
        parameter: nn.Parameter = self.base().weight
        return parameter

    def _shape(self) -> tuple[int, ...]:
        base: Any = self.base()
        return (base.nf, base.nx) if self.is_conv1d else (base.out_features, base.in_features)

    def own_weight(self) -> Tensor:
        base = self.base()
        if self.is_quantised:
            return dequantize_module_weight(base).detach()
        weight: Tensor = base.weight
        return weight.T if self.is_conv1d else weight

    def _in_place(self, weight_OI: Tensor) -> Tensor:
        return weight_OI.T if self.is_conv1d else weight_OI

    def _fold(self, weight: Tensor, change: Tensor) -> Tensor:
        made = super()._fold(weight, change)
        return made.T.contiguous().T if self.is_conv1d else made

    # --- rows ------------------------------------------------------------------------------------

    def use_rows(self, rows: Rows | None) -> None:
        """Experts of its own for each row of the next batches; None for the active ones."""
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
            made = self.folded_weight(change)
            if made is not None:
                vectors = self.vectors_for(change)
                return FoldedLinear.apply(x, change, made, self._bias(), vectors, self.is_conv1d)
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
        """V and V^T of so many singular values; the views are kept, for a step of generation is
        short."""
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
        """The rows' changes beside this batch; the same at each step of a generation."""
        assert self.rows is not None and self._row_change is not None
        key = (self.rows.batch, along.shape[:-1], along.dtype)
        if self._spread_for != key or self._row_change.requires_grad:
            name = type(self.base()).__name__
            self._spread_rows = self.rows.beside(self._row_change, along, name)
            self._spread_for = key
        return self._spread_rows

    def __repr__(self) -> str:
        return "svf." + super().__repr__()
