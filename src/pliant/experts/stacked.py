"""A stacked weight of a mixture of experts with SVF experts: PEFT's layer for a parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pliant.errors import InvalidInput, UnsupportedModel
from pliant.experts.config import SVFConfig
from pliant.experts.folded import folded
from pliant.experts.layer import SVFLayer
from pliant.experts.rows import Rows


class ParamWrapper(nn.Module, SVFLayer):
    """A module with all experts of a mixture, one of whose stacked weights SVF experts scale.

    PEFT looks for this class name when it nests one wrapper in another.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, parameter_name: str, config: SVFConfig
    ) -> None:
        super().__init__()
        self.parameter_name = parameter_name
        self._start(base_layer, config.exact_limit)
        self._active_adapter = adapter_name
        self.rows: Rows | None = None
        self._row_weights: dict[int, dict[str, Tensor]] = {}
        self.update_layer(adapter_name, config)

    def _parameter(self) -> nn.Parameter:
        parameter: nn.Parameter = getattr(self.base(), self.parameter_name)
        return parameter

    def own_weight(self) -> Tensor:
        return self._parameter()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.rows is not None and not self.disable_adapters:
            return self._by_rows(args, kwargs)
        change = None
        if not (self.disable_adapters or self.merged):
            change = self.change_of(self.active_adapters)
        if change is None:
            return self.base_layer(*args, **kwargs)
        weights = {self._path(): self._with(change)}
        return torch.func.functional_call(self.base_layer, weights, args, kwargs, tie_weights=False)

    # --- rows ------------------------------------------------------------------------------------

    def use_rows(self, rows: Rows | None) -> None:
        """Give each row of the next batches its experts; None: all rows use the active ones."""
        self.rows, self._row_weights = rows, {}

    def _by_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The tokens of rows with the same experts go through the module together.

        The outermost wrapper of a module does this for the wrappers inside it.
        """
        assert self.rows is not None
        wrappers = list(self._wrappers())
        if any(wrapper.merged for wrapper in wrappers):
            raise InvalidInput("unmerge the experts before each row uses its own")
        names = {name for wrapper in wrappers for name in wrapper.svf_z}
        groups = self.rows.groups(names, self.layer_index)
        if len(groups) == 1:
            return self._as_group(0, groups[0][1], args, kwargs)
        what = type(self.base()).__name__
        outputs, entries = [], []
        for number, (members, mixture) in enumerate(groups):
            inputs = _GroupInputs(self.rows, members, what, len(self.own_weight()))
            output = self._as_group(number, mixture, inputs.of(args), inputs.of(kwargs))
            if inputs.entries is None or len(output) != len(inputs.entries):
                raise UnsupportedModel(
                    f"{what} returns {len(output)} entries, which cannot be assigned to the rows "
                    "of the batch: use one expert for the whole batch"
                )
            outputs.append(output)
            entries.append(inputs.entries)
        return torch.cat(outputs)[torch.cat(entries).argsort()]

    def _as_group(
        self, number: int, mixture: Mapping[str, Tensor], args: Sequence[Any], kwargs: Any
    ) -> Any:
        """The module's output with one mixture of experts in all its stacked weights."""
        if number not in self._row_weights:
            mixed = {w.parameter_name: w._mixed(mixture) for w in self._wrappers()}
            weights = {name: weight for name, weight in mixed.items() if weight is not None}
            if self.form == "folded" and not torch.is_grad_enabled():
                self._row_weights[number] = weights
        else:
            weights = self._row_weights[number]
        base = self.base()
        if not weights:
            return base(*args, **kwargs)
        return torch.func.functional_call(base, weights, tuple(args), kwargs, tie_weights=False)

    def _mixed(self, mixture: Mapping[str, Tensor]) -> Tensor | None:
        """The stacked weight with a mixture of experts in it; None if none of them changes it."""
        assert self.rows is not None
        changes = {name: change for name, change in self.changes().items() if name in mixture}
        if not changes:
            return None
        size = max(change.shape[-1] for change in changes.values())
        change = torch.stack(
            [
                mixture[name].to(d.device) * nn.functional.pad(d, (0, size - d.shape[-1]))
                for name, d in changes.items()
            ]
        ).sum(0)
        return folded(self.own_weight(), self.vectors_for(change), change)

    def _wrappers(self) -> Iterator[ParamWrapper]:
        """This wrapper and those inside it."""
        module: Any = self
        while isinstance(module, ParamWrapper):
            yield module
            module = module.base_layer

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The experts' module itself, once each of the nested wrappers is merged, if asked for."""
        module: nn.Module = self
        while isinstance(module, ParamWrapper):
            if merge:
                module.merge(safe_merge, adapter_names)
            elif module.merged:
                module.unmerge()
            module = module.base_layer
        return module

    def _with(self, change: Tensor) -> Tensor:
        """The stacked weight with the change in it; its gradient goes through the weight."""
        if not torch.is_grad_enabled() and self.folds(change):
            weight = self.folded_weight(change)
            if weight is not None:
                return weight
        return folded(self.own_weight(), self.vectors_for(change), change)

    def _path(self) -> str:
        """From the wrapped module to the stacked weight, inside other wrappers."""
        path, module = self.parameter_name, self.base_layer
        while isinstance(module, BaseTunerLayer):
            path, module = f"base_layer.{path}", module.base_layer
        return path

    def __getattr__(self, name: str) -> Any:
        """Any other attribute that the model's code reads from the wrapped module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self._modules:
                raise
            return getattr(self.base(), name)

    def __repr__(self) -> str:
        return "svf." + super().__repr__()


class _GroupInputs:
    """Selects the entries of a module's inputs that belong to one group of rows."""

    def __init__(self, rows: Rows, members: Tensor, what: str, stacked: int) -> None:
        self.rows, self.members, self.what, self.stacked = rows, members, what, stacked
        self.entries: Tensor | None = None
        """The indices of this group's entries in the first input."""

    def of(self, inputs: Any) -> Any:
        if isinstance(inputs, Mapping):
            return {name: self.of(value) for name, value in inputs.items()}
        if isinstance(inputs, tuple):
            return tuple(self.of(value) for value in inputs)
        if not isinstance(inputs, Tensor) or inputs.dim() == 0:
            return inputs
        row_of = self.rows.row_of(inputs, self.what, self.stacked)
        entries = torch.isin(row_of, self.members.to(row_of.device)).nonzero().flatten()
        if self.entries is None:
            self.entries = entries
        return inputs[entries]
