"""What all layers with experts share: each expert's z, one basis, merging, the folded weight."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pliant.errors import AdapterError, CorruptFile
from pliant.experts.basis import basis_of
from pliant.experts.config import SVFConfig
from pliant.experts.folded import NEAR_ZERO, folded

EXPERTS = "svf_z"
"""The part of a layer that holds its experts."""

FOLD_ABOVE = 1 / 8
"""The share of the full rank up to which the delta form trains faster
(benchmarks/expert_speed.py)."""


class Change(nn.Module):
    """d = z - 1 for each singular value, in fp32: bf16 would lose small steps near 1."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*size, dtype=torch.float32))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """PEFT loads whatever a file holds."""
        saved = state_dict.get(f"{prefix}weight")
        if saved is not None and not saved.is_meta and not saved.isfinite().all():
            raise CorruptFile(f"{prefix}weight holds NaN or infinity: its training had diverged")
        super()._load_from_state_dict(state_dict, prefix, *rest)


class SVFLayer(BaseTunerLayer):
    """What a projection and a mixture's stacked weight share: experts, a basis, and merging."""

    base_layer: Any
    active_adapters: list[str]
    svf_basis: Tensor
    svf_z: Any
    merged_adapters: list[str]
    disable_adapters: bool
    merged: bool

    adapter_layer_names = (EXPERTS,)
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
        self._original: Tensor | None = None
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

    def weight_alone(self) -> Tensor:
        """The base's weight without the experts that may be merged into it."""
        first = self.tied_to[0] if self.tied_to else self
        return self.own_weight() if first._original is None else first._original

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
            weight = self.weight_alone()
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
        changes = [self.svf_z[name].weight for name in names if name in self.svf_z]
        if not changes:
            return None
        if len(changes) == 1:
            return changes[0]
        size = max(d.shape[-1] for d in changes)
        return torch.stack([nn.functional.pad(d, (0, size - d.shape[-1])) for d in changes]).sum(0)

    def vectors_for(self, change: Tensor) -> Tensor:
        """As many singular vectors as the change has numbers."""
        return self.ensure_basis()[..., : change.shape[-1]]

    # --- merging ---------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the active experts, or `adapter_names`, into the weight, and store the original."""
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
        if self._original is None:
            self._original = self.own_weight().detach().clone()
        change = self.change_of([*self.merged_adapters, *names])
        assert change is not None
        merged = folded(self._original, self.vectors_for(change), change.detach())
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaN or infinity in the merged weights of {', '.join(names)}")
        parameter.data.copy_(self._in_place(merged))
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the original weight, bit by bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._original is not None:
            self._parameter().data.copy_(self._in_place(self._original))
            self._original = None
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
        """The weight with this change in it, computed again when either has changed.

        None if some singular value is scaled to about zero: the gradient would divide by it.
        """
        if self.tied_to:
            return self.tied_to[0].folded_weight(change)
        weight = self.own_weight()
        key = (change.detach().clone(), weight.data_ptr(), weight._version)
        cached_key, result = self._folded
        unchanged = cached_key is not None and key[1:] == cached_key[1:]
        if not unchanged or not torch.equal(key[0], cached_key[0]):
            near_zero = bool(((1 + change).abs() < NEAR_ZERO).any())
            result = None if near_zero else self._fold(weight, change)
            self._folded = (key, result)
        return result

    def _fold(self, weight: Tensor, change: Tensor) -> Tensor:
        return folded(weight.detach(), self.vectors_for(change), change.detach())

    def folds(self, change: Tensor) -> bool:
        """Whether the folded form runs: if `form` says so, or under "auto" while z is trained."""
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
