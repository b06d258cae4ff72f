"""Routers that choose among the experts that remain, as those of a smaller stock model do.

    own = attach(model, {"0": (1, 6), "1": (0, 3)})     # layer 0 loses experts 1 and 6, ...
    own.detach()                                        # all of them are again to be chosen

A gate at 0 leaves a token with fewer experts; a router that does not know of an expert chooses
another. How it does that (softmax or sigmoid, groups, a bias, weights that sum to 1) is the
architecture's own: the code of the smaller stock model's router runs, with the rows that remain of
the original's weights, and the original's experts run under their old numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from pliant import adapters
from pliant.adapters import Adapter, Around, Wire
from pliant.anatomy import Anatomy
from pliant.anatomy.find import path_of
from pliant.anatomy.modes import eval_mode
from pliant.anatomy.trial import trial_ids
from pliant.errors import InvalidInput, UnsupportedModel, named_settings
from pliant.structure.stock.smaller import Stock, with_fewer
from pliant.structure.units import Site, sites_of

PROBE = 8  # tokens in each of the two rows on which a form is tried


@named_settings
@dataclass(frozen=True)
class RemainingExpertsConfig:
    """The experts that routers no longer choose."""

    removed: dict[str, tuple[int, ...]]
    """By site (the layer, nearly always); as many in every layer that has a mixture."""

    def __post_init__(self) -> None:
        removed = {str(key): tuple(units) for key, units in self.removed.items()}
        object.__setattr__(self, "removed", removed)
        for key, units in removed.items():
            if len(set(units)) < len(units):
                raise InvalidInput(f"layer {key} names an expert twice: {units}")
        counts = {key: len(units) for key, units in removed.items()}
        if not any(counts.values()):
            raise InvalidInput("no expert is named: give one to remove in every layer")
        if len(set(counts.values())) > 1:
            raise UnsupportedModel(
                f"layers lose different numbers of experts ({counts}), and a stock config has one "
                "number for all: name as many in every layer"
            )


class RemainingExperts(Adapter):
    """The model as if it lacked some experts, until it is detached or exported."""

    part = "structure"
    default_name = "remaining_experts"
    config_class = RemainingExpertsConfig

    def __init__(self, model: nn.Module, config: RemainingExpertsConfig) -> None:
        super().__init__(model, config)
        sites = {site.key: site for site in sites_of(Anatomy.of(model), ["experts"])}
        if missing := sites.keys() ^ config.removed.keys():
            raise InvalidInput(
                f"layer {min(missing)}: name the experts to remove for each of the layers "
                f"{', '.join(sites)}, which have a mixture, and for no other"
            )
        for key, units in config.removed.items():
            if wrong := [unit for unit in units if not 0 <= unit < sites[key].count]:
                raise InvalidInput(
                    f"layer {key} has no expert {wrong[0]}: it has 0 to {sites[key].count - 1}"
                )
        self._restricted: list[Restricted] = []

    @property
    def remaining(self) -> dict[str, Tensor]:
        """The experts to choose from, by site, in their order."""
        sites = sites_of(self.anatomy, ["experts"])
        gone = self.config.removed
        return {
            s.key: torch.tensor([i for i in range(s.count) if i not in gone[s.key]]) for s in sites
        }

    def wire(self, model: nn.Module) -> Iterator[Wire]:
        self._restricted = self._find_form(model)
        yield from self._hooks()

    def _hooks(self) -> Iterator[Wire]:
        for i, restricted in enumerate(self._restricted):
            if not restricted.are_experts:
                yield Around(restricted.source, partial(self._run, i))

    def _run(self, i: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
        return self._restricted[i].module.forward(*args, **kwargs)

    def _find_form(self, model: nn.Module) -> list[Restricted]:
        """The first stock form that runs."""
        _check_room(model, self.remaining)
        why = "the experts' number is no number of its config alone"
        for stock in with_fewer(model, "experts", self.remaining):
            self._restricted = list(_restricted_modules(model, stock, self.remaining))
            if not (why_not := self._try_form(model)):
                return self._restricted
            why = why_not
        raise UnsupportedModel(
            f"{type(model).__name__} does not run with {len(next(iter(self.remaining.values())))} "
            f"experts in each layer ({why})"
        )

    def _try_form(self, model: nn.Module) -> str:
        """Why the model does not run in this form; empty if it does."""
        connections = []
        try:
            connections = [wire.connect(self) for wire in self._hooks()]
            with eval_mode(model), torch.no_grad():
                model(input_ids=trial_ids(Anatomy.of(model), PROBE), use_cache=False)
        except Exception as error:  # whatever a router of an unforeseen size may raise
            return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        finally:
            for connection in reversed(connections):
                connection.remove()
        return ""


def attach(
    model: nn.Module, removed: Mapping[str, Sequence[int]], name: str | None = None
) -> RemainingExperts:
    """Take experts, by site, out of the choice of `model`'s routers."""
    config = RemainingExpertsConfig({key: tuple(units) for key, units in removed.items()})
    return adapters.attach(model, RemainingExperts(model, config), name)


def _check_room(model: nn.Module, remaining: Mapping[str, Tensor]) -> None:
    """Raise if a token goes to more experts than remain."""
    for site, chosen in _choices(model):
        left = len(remaining[site.key])
        if left < chosen:
            raise InvalidInput(
                f"layer {site.layer} would keep {left} of {site.count} experts, and each token "
                f"goes to {chosen}: remove {site.count - chosen} at most"
            )


@torch.no_grad()
def _choices(model: nn.Module) -> list[tuple[Site, int]]:
    """To how many experts each token goes, by site; 1 where that does not show."""
    anatomy = Anatomy.of(model)
    sites = sites_of(anatomy, ["experts"])
    seen: dict[int, int] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = next((v for v in (*args, *kwargs.values()) if is_index(v)), None)
        seen[id(module)] = 1 if index is None else index.shape[1]

    handles = [s.module.register_forward_pre_hook(note, with_kwargs=True) for s in sites]
    try:
        with eval_mode(model):
            model(input_ids=trial_ids(anatomy, PROBE), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [(site, seen.get(id(site.module), 1)) for site in sites]


# --- the modules of the smaller model ------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Restricted:
    """A module of the smaller model that runs in place of the original's."""

    module: nn.Module
    source: nn.Module
    are_experts: bool


def _restricted_modules(
    model: nn.Module, stock: Stock, remaining: Mapping[str, Tensor]
) -> Iterator[Restricted]:
    with torch.device("meta"):
        smaller = stock.kind(copy.deepcopy(stock.config))
    anatomy, after = Anatomy.of(model), smaller.state_dict()
    shrunk = {k: t for k, t in model.state_dict().items() if t.shape != after[k].shape}
    for site in sites_of(anatomy, ["experts"]):
        layer = f"{path_of(model, anatomy.layers[site.layer])}."
        axes = {
            key: _entries(tensor, after[key], remaining[site.key], site.count)
            for key, tensor in shrunk.items()
            if key.startswith(layer)
        }
        experts = path_of(model, site.module)
        assert experts is not None
        owners = {key.rpartition(".")[0] for key in axes}
        for path in _between(owners):
            source, module = model.get_submodule(path), smaller.get_submodule(path)
            own = {k.rpartition(".")[2]: a for k, a in axes.items() if k.rpartition(".")[0] == path}
            _read_from(source, module, own)
            if path == experts:
                _call_experts(module, remaining[site.key], site.count)
            yield Restricted(module, source, path == experts)


def _entries(before: Tensor, after: Tensor, remaining: Tensor, count: int) -> tuple[int, Tensor]:
    """The axis that has shrunk, and which of its entries stay."""
    sizes = zip(before.shape, after.shape, strict=True)
    axis = next(i for i, (old, new) in enumerate(sizes) if old != new)
    return axis, torch.cat([remaining, torch.arange(count, before.shape[axis])])


def _between(owners: set[str]) -> list[str]:
    """The modules from the one that holds all of these down to each, the innermost first."""
    parts = [owner.split(".") for owner in owners]
    common = [
        names[0] for names in takewhile(lambda n: len(set(n)) == 1, zip(*parts, strict=False))
    ]
    paths = {".".join(p[:n]) for p in parts for n in range(len(common), len(p) + 1)}
    return sorted(paths, key=lambda path: -path.count("."))


class _Reading:
    """Mixed into the class of a module that has no tensors of its own: it reads another's.

    A call is a call of that other module, whose hooks run, and whose forward is this one's.
    """

    _source: tuple[nn.Module]
    """In a tuple, or torch would register it as a child."""
    _axes: dict[str, tuple[int, Tensor]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._source[0](*args, **kwargs)

    @property
    def training(self) -> bool:
        return self._source[0].training

    @training.setter
    def training(self, value: bool) -> None:
        """It is the source's."""

    def _tensor(self, name: str) -> Tensor | None:
        tensor: Tensor | None = getattr(self._source[0], name)
        if tensor is None or name not in self._axes:
            return tensor
        axis, index = self._axes[name]
        if index.device != tensor.device:
            self._axes[name] = axis, index = axis, index.to(tensor.device)
        return tensor.index_select(axis, index)


def _read_from(
    source: nn.Module, module: nn.Module, axes: Mapping[str, tuple[int, Tensor]]
) -> None:
    """Let a module without weights compute with those entries of the source's tensors."""
    names = [*module._parameters, *module._buffers]
    for name in names:
        before, after = getattr(source, name), getattr(module, name)
        if name not in axes and before is not None and before.shape != after.shape:
            raise UnsupportedModel(
                f"the {name} of {type(source).__name__} is {tuple(before.shape)} and would be "
                f"{tuple(after.shape)}, and which entries stay is unknown"
            )
        if before is not None and before.dim() > 1 and not before.is_floating_point():
            raise UnsupportedModel(
                f"{type(source).__name__} looks experts up in a table, {name}, instead of choosing "
                "them: gates work, removal does not"
            )
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            vars(module)[name] = getattr(source, name)
    for name, child in source.named_children():
        has_tensors = next(chain(child.parameters(), child.buffers()), None) is not None
        if has_tensors and not isinstance(module._modules[name], _Reading):
            module._modules[name] = child
    kind = type(module)
    tensors = {name: property(partial(_Reading._tensor, name=name)) for name in names}
    vars(module).pop("training", None)
    vars(module).update(_source=(source,), _axes=dict(axes))
    module.__class__ = type(kind.__name__, (_Reading, kind), tensors)


def _call_experts(module: nn.Module, remaining: Tensor, count: int) -> None:
    """A call of the smaller model's experts is one of the original's, under their old numbers."""
    kind = type(module)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        own, source = remaining.to(_device(args, kwargs)), self._source[0]
        if not any(is_index(value) for value in (*args, *kwargs.values())):
            return _call_stacked(source, args[0], own, count)
        renumbered = partial(_renumbered, remaining=own, count=count)
        return source(*map(renumbered, args), **{k: renumbered(v) for k, v in kwargs.items()})

    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def _renumbered(value: Any, remaining: Tensor, count: int) -> Any:
    if not is_index(value):
        return value
    # LongCat numbers experts that compute nothing after the others.
    known = remaining[value.clamp(max=len(remaining) - 1)]
    return torch.where(value < len(remaining), known, value - len(remaining) + count)


def _call_stacked(experts: nn.Module, x: Tensor, remaining: Tensor, count: int) -> Tensor:
    """Llama 4 runs every expert on all tokens, which lie one expert's after the other's."""
    stacked = x.view(len(remaining), -1, x.shape[-1])
    full = stacked.new_zeros(count, *stacked.shape[1:]).index_copy(0, remaining, stacked)
    output: Tensor = experts(full.view(-1, x.shape[-1]))
    return output.view(count, -1, output.shape[-1])[remaining].view(-1, output.shape[-1])


def is_index(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def _device(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    return next(v.device for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
