"""Gates: one number for each head, channel, expert or layer, which scales what it contributes.

    gates = attach(model, GateConfig(units=("heads", "layers")))
    with torch.no_grad():
        gates["heads", 3][5] = 0        # head 5 of layer 3 contributes nothing
    model.generate(...)                 # with the gates; gates.detach() restores the model

At 1 a gate changes no bit. A head's gate scales its slice of the input of the attention's output
projection, a channel's that of the down projection, an expert's the weight with which the router
chose it; a layer's mixes its input and output.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pliant import adapters
from pliant.adapters import Adapter, After, Before, Wire
from pliant.adapters.quantized import differentiable
from pliant.anatomy import Anatomy
from pliant.errors import AdapterError, InvalidInput, UnsupportedModel, did_you_mean
from pliant.structure.config import GateConfig, Kind, check_pattern_name
from pliant.structure.scaling import beside, scaling
from pliant.structure.units import Site, sites_of


def attach(model: nn.Module, config: GateConfig | None = None, name: str | None = None) -> Gates:
    """New gates on `model`, all at 1."""
    return adapters.attach(model, Gates(model, config or GateConfig()), name)


def gates_on_heads(base: nn.Module, name: str, whose: str) -> Gates:
    """The gates on heads that are attached to `base` under this name."""
    gates = adapters.attached(base).get(name)
    if not isinstance(gates, Gates) or "heads" not in gates.config.units:
        raise AdapterError(
            f"{whose} needs gates on heads attached as {name!r}, and there are none: call "
            "pliant.structure.attach(model) before"
        )
    return gates


class Gates(Adapter):
    """Gates on a model's units; `gates[kind, layer]` is a parameter to read, write or train."""

    part = "structure"
    config_class = GateConfig

    def __init__(self, model: nn.Module, config: GateConfig) -> None:
        super().__init__(model, config)
        sites = sites_of(Anatomy.of(model), config.units)
        self.patterns = nn.ModuleDict({name: Pattern(sites) for name in config.patterns})
        self._active: tuple[str, ...] = config.patterns[:1]
        """The pattern of all rows, or one for each row of the batch."""
        self._batch = (0, 0)
        """Rows and tokens of the batch that runs, where rows have patterns of their own."""
        self._projected = Projected()
        self.controlled_by: Callable[[str, Kind, str], Tensor | None] | None = None
        """Gives the gates of (pattern, kind, key) in place of their own values, or None."""

    def __getitem__(self, unit: tuple[Kind, int] | tuple[Kind, int, int]) -> nn.Parameter:
        """The gates of a layer's heads, channels, ... in the first active pattern."""
        kind, layer, *block = unit
        key = f"{layer}_{block[0]}" if block and block[0] else str(layer)
        return self.pattern()[kind, key]

    def pattern(self, name: str | None = None) -> Pattern:
        """The gates of this name; by default, of the active pattern."""
        name = self._active[0] if name is None else name
        self._check(name)
        pattern = self.patterns[name]
        assert isinstance(pattern, Pattern)
        return pattern

    @property
    def active(self) -> tuple[str, ...]:
        """The pattern of all rows, or one for each row of the batch."""
        return self._active

    @property
    def sites(self) -> list[Site]:
        """Where the gates act; needs the model that they are attached to."""
        return sites_of(self.anatomy, self.config.units)

    def summary(self) -> str:
        """The gates of each kind in the active pattern, and how many are closed."""
        counts = []
        for kind in self.config.units:
            gates = [g for n, g in self.pattern().named_parameters() if n.split(".")[0] == kind]
            closed = sum(int((gate == 0).sum()) for gate in gates)
            counts.append(f"{closed} of {sum(g.numel() for g in gates):,} {kind} closed")
        patterns = f" ({len(self.patterns)} patterns)" if len(self.patterns) > 1 else ""
        return f"{', '.join(counts)} in pattern {self.active[0]!r}{patterns}"

    # --- patterns ------------------------------------------------------------------------------

    def add_pattern(self, name: str, like: str | None = None) -> Pattern:
        """A new pattern with the gates of `like`, or with all at 1."""
        check_pattern_name(name)
        if name in self.patterns:
            raise InvalidInput(f"there is a pattern {name!r} already")
        new = Pattern(self.sites)
        if like is not None:
            new.load_state_dict(self.pattern(like).state_dict())
        first = next(self.pattern().parameters())
        self.patterns[name] = new.to(first.device, first.dtype)
        self.config = replace(self.config, patterns=(*self.config.patterns, name))
        if self._link is not None:
            self._link.shapes = adapters.saving.tensor_shapes(self.state_dict())
        return new

    def use(self, name: str) -> None:
        """Make a pattern the active one, for all rows of every batch."""
        self._check(name)
        self._active = (name,)

    @contextmanager
    def rows(self, names: Sequence[str]) -> Iterator[None]:
        """Use a pattern of its own for each row of the batches that run inside the block.

        A batch may also hold several copies of each row, one after the other, as beam search does.
        """
        if not names:
            raise InvalidInput("rows([]): give the name of a pattern for each row")
        for name in names:
            self._check(name)
        before, self._active = self._active, tuple(names)
        try:
            yield
        finally:
            self._active = before

    def _check(self, name: str) -> None:
        if name not in self.patterns:
            raise InvalidInput(f"no pattern {name!r}{did_you_mean(name, self.patterns)}")

    # --- in the model's forward ----------------------------------------------------------------

    def wire(self, model: nn.Module) -> Iterator[Wire]:
        sites = self.sites
        self._check_units(sites)
        yield from differentiable(model)
        yield Before(model, self._note_batch)
        yield Before(self.anatomy.decoder, self._enter_decoder)
        for site in sites:
            read = self._gate if site.slices is None else self._gate_of_all_rows
            gate = partial(read, site.kind, site.key)
            if site.kind in ("heads", "channels", "expert_channels", "recurrent_heads"):
                yield from scaling(site, gate)
                if site.block_module is not None:
                    yield Before(site.module, partial(self._note_projection, site.key))
                    yield After(site.block_module, partial(self._check_projection, site.key))
            elif site.kind == "experts":
                yield Before(site.module, partial(self._scale_experts, gate, site.count))
            elif site.kind == "layers":
                yield After(site.module, partial(self._mix_layer, gate))
            else:
                yield After(site.module, partial(self._scale_output, gate))

    def _check_units(self, sites: Sequence[Site]) -> None:
        """A module that was replaced since gates were made for it may have other units, or none."""
        made = {name: len(gate) for name, gate in self.pattern().named_parameters()}
        now = {f"{site.kind}.{site.key}": site.count for site in sites}
        if made != now:
            kind, _, key = next(iter(sorted(made.items() ^ now.items())))[0].partition(".")
            raise AdapterError(
                f"the {kind} of layer {key} are not those that these gates were made for: modules "
                "of the model were replaced. Restore them, or attach new gates"
            )

    def _note_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        if len(self._active) > 1:
            ids = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            self._batch = (ids.shape[0], ids.shape[1])

    def _enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """Follow the modules that are gated; a PeftModel calls the model without its hooks."""
        if not self.in_place():
            self.rewire()
        if len(self._active) > 1:
            for name in ("input_ids", "inputs_embeds"):
                value = kwargs.get(name)
                if isinstance(value, Tensor):
                    self._batch = (value.shape[0], value.shape[1])

    def _note_projection(self, key: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._projected.keys = (*self._projected.keys, key)

    def _check_projection(
        self, key: str, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        """Raise if the mixer has used its output projection's weight without calling it."""
        if key not in self._projected.keys:
            raise UnsupportedModel(
                f"the {type(module).__name__} of layer {key} ran a kernel that includes its output "
                "projection, so that its gates had no effect: run the model in eval mode, or load "
                "it without such kernels (use_kernels=False)"
            )
        self._projected.keys = tuple(k for k in self._projected.keys if k != key)

    def _gate(self, kind: Kind, key: str, like: Tensor) -> Tensor:
        """(units,), or (rows of `like`, units) where rows have patterns of their own."""
        own = [self._value(name, kind, key) for name in self._active]
        if len(own) == 1:
            return own[0].to(like.dtype)
        batch, length = self._batch
        if batch % len(own):
            raise InvalidInput(f"there are patterns for {len(own)} rows, and the batch has {batch}")
        axis = max(0, like.dim() - 3)  # Gemma 3n's layers have streams before the rows
        # Tokens may be joined to one axis, row after row; XLNet has them before the rows.
        if like.shape[axis:-1] not in ((batch, length), (batch * length,)):
            raise UnsupportedModel(
                f"{type(self.base).__name__} gives its {kind} a tensor of shape "
                f"{tuple(like.shape)} for {batch} rows of {length} tokens, in which the rows "
                "cannot be told apart: use one pattern for the whole batch"
            )
        copies = like.shape[axis] // len(own)
        return torch.stack(own).to(like.dtype).repeat_interleave(copies, dim=0)

    def _gate_of_all_rows(self, kind: Kind, key: str, like: Tensor) -> Tensor:
        """(units,)"""
        if len(self._active) > 1:
            raise UnsupportedModel(
                f"the {kind} of layer {key} are gated at their weights, which all rows share: use "
                "one pattern for the whole batch"
            )
        return self._value(self._active[0], kind, key).to(like.dtype)

    def _value(self, name: str, kind: Kind, key: str) -> Tensor:
        controlled = self.controlled_by(name, kind, key) if self.controlled_by else None
        own: Tensor = self.patterns[name][kind, key]  # type: ignore[index]
        return own if controlled is None else controlled.to(own.device)

    def _scale_experts(
        self,
        gate: Any,
        count: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        index = next((v for v in (*args, *kwargs.values()) if _is_index(v)), None)
        if index is None:  # Llama 4 runs every expert on every token, weighed by the router before
            return (_scale_stacked(gate, args[0], count), *args[1:]), kwargs

        def scaled(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                return value
            if value.shape != index.shape:
                return value
            # LongCat's router may also choose experts without weights, which are not gated.
            scale = nn.functional.pad(gate(value), (0, 1), value=1.0)
            chosen = index.clamp(max=scale.shape[-1] - 1)
            return value * (scale[chosen] if scale.dim() == 1 else scale.gather(1, chosen))

        return tuple(map(scaled, args)), {name: scaled(v) for name, v in kwargs.items()}

    def _mix_layer(
        self, gate: Any, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> Any:
        before = args[0] if args else kwargs["hidden_states"]
        after = output if isinstance(output, Tensor) else output[0]
        # lerp is exact at 1, where before + (after - before) is not. Mamba takes bf16, gives fp32.
        weight = beside(gate(after), after)
        return with_first(output, torch.lerp(before.to(after.dtype), after, weight))

    def _scale_output(
        self, gate: Any, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> Any:
        first = output if isinstance(output, Tensor) else output[0]
        return with_first(output, first * beside(gate(first), first))


class Projected(threading.local):
    """The recurrent mixers whose output projection has run in this thread."""

    def __init__(self) -> None:
        self.keys: tuple[str, ...] = ()

    def __reduce__(self) -> Any:
        return Projected, ()


class Pattern(nn.Module):
    """One set of gates: a vector for each site."""

    def __init__(self, sites: Sequence[Site]) -> None:
        super().__init__()
        for site in sites:
            if not hasattr(self, site.kind):
                self.add_module(site.kind, nn.ParameterDict())
            own = getattr(self, site.kind)
            own[site.key] = nn.Parameter(torch.ones(site.count, device=_device(site.module)))

    def __getitem__(self, unit: tuple[Kind, str]) -> nn.Parameter:
        kind, key = unit
        own = self._modules.get(kind)
        if own is None:
            raise InvalidInput(f"{kind} are not gated{did_you_mean(kind, self._modules)}")
        gate = own._parameters.get(key)
        if gate is None:
            raise InvalidInput(
                f"layer {key} has no {kind} to gate{did_you_mean(key, own._parameters)}"
            )
        return gate


def _device(module: nn.Module) -> torch.device:
    """That of its weights; the CPU for those that are not at hand."""
    devices = (p.device for p in module.parameters() if not p.is_meta)
    return next(devices, torch.device("cpu"))


def with_first(output: Any, first: Tensor) -> Any:
    if isinstance(output, Tensor):
        return first
    rest = (first, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else rest


def _scale_stacked(gate: Any, x: Tensor, count: int) -> Tensor:
    """The tokens of the first expert, then those of the second, ..., each times its gate."""
    stacked = x.view(count, -1, x.shape[-1])
    scale = gate(stacked[0])
    scale = scale[:, None] if scale.dim() == 1 else scale.T
    return (stacked * scale[..., None]).view_as(x)


def _is_index(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()
