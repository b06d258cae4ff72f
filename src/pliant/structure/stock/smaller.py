"""A stock model with fewer units of one kind: its config, and the slices of every tensor.

Nothing here knows an architecture. A smaller config is one of the same class in which some numbers
that were the old count are the new one. A model built of it shows by its shapes which axes have
shrunk (`layouts`). Where an axis may be laid out in several ways, each way is a candidate, and the
caller compares outputs.

A candidate's tensors are made when they are asked for, so the model may be one without weights at
hand: then its shapes make the plan, and `state` reads the tensors from elsewhere.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, islice, product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from pliant.adapters.stock import assembled, skeleton
from pliant.anatomy import Anatomy
from pliant.anatomy.blocks import HEAD_COUNTS, HEAD_WIDTHS, KV_COUNTS
from pliant.anatomy.config import config_of_layers, read
from pliant.anatomy.find import path_of
from pliant.errors import UnsupportedModel
from pliant.structure.config import Kind
from pliant.structure.stock.layouts import Axis, Layout, Shapes, shrunk_axes
from pliant.structure.stock.lazy_state import LazyState, State
from pliant.structure.units import Site, sites_of, units_of

MOST_LAYOUTS = 32


@dataclass(frozen=True)
class Choice:
    """Which of the candidates: the same description fits models that differ in depth alone."""

    form: type[nn.Module]
    change: Mapping[str, Any]
    """Numbers of the config and their new values."""
    layouts: Mapping[str, int]
    """For each axis, by its name, which of its possible layouts."""


@dataclass(frozen=True, eq=False)
class Stock:
    """A stock model that is not compared with its original yet."""

    config: Any
    kind: type[nn.Module]
    state: State = field(repr=False)
    choice: Choice | None = None

    def skeleton(self) -> Any:
        """The model without weights."""
        return skeleton(self.kind, self.config)

    def build(self) -> Any:
        """The model, in eval mode; its tensors are those of `state`, and none is allocated."""
        return assembled(self.kind, self.config, self.state)


def without_layers(model: Any, remaining: list[int], state: State | None = None) -> Stock:
    """The model with these layers alone; `state` has its tensors if it has none itself."""
    anatomy = Anatomy.of(model)
    depth = len(anatomy.layers)
    config = config_of_layers(model.config, depth, remaining)
    paths = [path_of(model, layer) for layer in anatomy.layers]
    stack = {str(p).rpartition(".")[0] for p in paths}
    if len(stack) != 1 or None in paths:
        raise UnsupportedModel(f"{type(model).__name__}: its layers are no single stack")
    new = {f"{paths[old]}.": f"{paths[i]}." for i, old in enumerate(remaining)}
    own = model.state_dict()
    names: dict[str, str] = {}
    for key in own:
        old = next((f"{path}." for path in paths if key.startswith(f"{path}.")), None)
        if old is None:
            names[key] = key
        elif old in new:
            names[new[old] + key.removeprefix(old)] = key
    source = own if state is None else state
    lazy = LazyState({name: partial(source.__getitem__, key) for name, key in names.items()})
    stock = Stock(config, type(model), lazy)
    _check_shapes(stock, {name: own[key].shape for name, key in names.items()})
    return stock


def has_stock_form_without(model: Any, layers: Collection[int]) -> bool:
    """Whether the other layers make a stock model; it has the shapes for it, at least."""
    depth = len(Anatomy.of(model).layers)
    try:
        without_layers(model, [index for index in range(depth) if index not in layers])
    except UnsupportedModel:
        return False
    return True


def with_fewer(
    model: Any,
    kind: Kind,
    remaining: Mapping[str, Tensor],
    *,
    state: State | None = None,
    choice: Choice | None = None,
) -> Iterator[Stock]:
    """Candidates for the model with these units alone, by a site's key.

    For heads the units are groups that share a KV head; where all heads share one, they are heads.
    `state` has the model's tensors if it has none itself. With a `choice` it is the only candidate.
    """
    anatomy = Anatomy.of(model)
    sites = sites_of(anatomy, [kind])
    counts = {site.key: len(remaining[site.key]) for site in sites}
    own = model.state_dict()
    before = {key: tensor.shape for key, tensor in own.items()}
    why, any_fits = "no number of its config is their count", False
    for form, config, change in _smaller_forms(model, sites, counts):
        if choice is not None and (form, change) != (choice.form, choice.change):
            continue
        try:
            config.validate()
            after = {k: t.shape for k, t in on_meta(form, config).state_dict().items()}
        except Exception as error:  # whatever a config or a constructor may raise
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        axes = list(shrunk_axes(anatomy, before, after, sites, counts))
        if not axes or any(axis.layouts is None for axis in axes):
            continue
        for layouts in _layout_choices(axes, choice):
            cuts = _cuts(axes, layouts, remaining)
            changes = {key: partial(_cut, by_axis) for key, by_axis in cuts.items()}
            if all(_cut_shape(before[k], cuts.get(k, {})) == after[k] for k in after):
                any_fits = True
                lazy = LazyState.over(own if state is None else state, changes)
                yield Stock(config, form, lazy, Choice(form, change, layouts))
    if not any_fits:
        raise UnsupportedModel(
            f"{type(model).__name__} has no stock form with {next(iter(counts.values()))} {kind} "
            f"in every layer ({why})"
        )


def _layout_choices(axes: list[Axis], choice: Choice | None) -> Iterator[dict[str, int]]:
    """For each axis, by its name, which of its layouts: all combinations, or the chosen one."""
    if choice is not None:
        if all(axis.name in choice.layouts for axis in axes):
            yield dict(choice.layouts)
        return
    options = {axis.name: range(len(axis.layouts or ())) for axis in axes}
    for numbers in islice(product(*options.values()), MOST_LAYOUTS):
        yield dict(zip(options, numbers, strict=True))


def _cuts(
    axes: list[Axis], chosen: Mapping[str, int], remaining: Mapping[str, Tensor]
) -> dict[str, dict[int, Tensor]]:
    """The indices that stay: by tensor and axis."""
    cuts: dict[str, dict[int, Tensor]] = {}
    for axis in axes:
        layout: Layout = (axis.layouts or ())[chosen[axis.name]]
        cuts.setdefault(axis.key, {})[axis.axis] = layout(remaining[axis.site.key])
    return cuts


def _cut(by_axis: dict[int, Tensor], tensor: Tensor) -> Tensor:
    for axis, index in by_axis.items():
        tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def _cut_shape(shape: torch.Size, by_axis: dict[int, Tensor]) -> torch.Size:
    return torch.Size(len(by_axis[i]) if i in by_axis else n for i, n in enumerate(shape))


# --- configs -------------------------------------------------------------------------------------


def _smaller_forms(
    model: Any, sites: list[Site], counts: Mapping[str, int]
) -> Iterator[tuple[type[nn.Module], Any, dict[str, Any]]]:
    """Classes with smaller configs and what changed in them: the model's own class, then Mistral's.

    A Llama insists that its hidden size is a multiple of its heads, and a Mistral, which computes
    the same, does not. A model that is no Llama has other tensors, or fails the comparison.
    """
    for config, change in _smaller_configs(model, sites, counts):
        yield type(model), config, change
    for config, change in _smaller_configs(model, sites, counts):
        names = vars(MistralConfig()).keys() - {"architectures", "transformers_version"}
        same = {k: v for k, v in vars(config).items() if k in names and not k.startswith("_")}
        try:
            mistral = MistralConfig(**{**same, "sliding_window": None})
        except Exception:  # a config with other kinds of numbers
            return
        yield MistralForCausalLM, mistral, change


def _smaller_configs(
    model: Any, sites: list[Site], counts: Mapping[str, int]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Configs in which some numbers are smaller, and those numbers; the likeliest first."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)  # left over from a GGUF file
    text = config.get_text_config(decoder=True)
    if sites[0].kind == "heads":
        changes = _head_changes(text, sites, counts)
    else:
        changes = _width_changes(text, sites, counts)
    for change in changes:
        for smaller in changed_configs(config, [change]):
            yield smaller, change


def changed_configs(config: Any, changes: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """The config with each of these changes, as far as it allows them."""
    for change in changes:
        smaller = copy.deepcopy(config)
        try:
            for name, value in change.items():
                _set(smaller.get_text_config(decoder=True), name, value)
        except Exception:  # a config may check what is set
            continue
        if change:
            yield smaller


def _head_changes(
    text: Any, sites: list[Site], counts: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    change: dict[str, Any] = {}
    for site in sites:  # Gemma 4's layers of full attention have KV heads of their own
        count, units = counts[site.key], units_of(site)
        heads = count * site.count // units
        change |= dict.fromkeys(_holding(text, HEAD_COUNTS, site.count), heads)
        if site.groups == units:
            change |= dict.fromkeys(_holding(text, KV_COUNTS, units), count)
    if not any(isinstance(read(text, name), int) for name in HEAD_WIDTHS):
        yield {**change, "head_dim": sites[0].width}  # or it would follow from the number of heads
    yield change


def _width_changes(
    text: Any, sites: list[Site], counts: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    site, count = sites[0], counts[sites[0].key]
    if len(set(counts.values())) > 1:
        yield from _changes_by_layer(text, sites, counts)
        return
    names = [name for name, value in vars(text).items() if _is_count(value, site.count, name)]
    if site.kind == "experts":
        names = [name for name in names if _EXPERTS.fullmatch(name)]
    sizes = range(1, len(names) + 1)
    subsets = (chosen for size in sizes for chosen in combinations(names, size))
    yield from (dict.fromkeys(chosen, count) for chosen in islice(subsets, 16))
    if site.kind != "channels":
        return
    hidden = read(text, "hidden_size")
    for name, value in vars(text).items():
        if value is None and _INNER.search(name):
            yield {name: count}
        elif "ratio" in name and isinstance(value, (int, float)) and value * hidden == site.count:
            yield {name: count // hidden if count % hidden == 0 else count / hidden}


def _changes_by_layer(
    text: Any, sites: list[Site], counts: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    """Lists with a number for each layer (Gemma 3n's intermediate_size)."""
    last = max(site.layer for site in sites)
    for name, value in vars(text).items():
        if not isinstance(value, (list, tuple)) or len(value) <= last:
            continue
        if all(value[site.layer] == site.count for site in sites):
            new = list(value)
            for site in sites:
                new[site.layer] = counts[site.key]
            yield {name: new}


_INNER = re.compile(r"inner|intermediate|ffn|d_ff")
# Not the experts of a token, those that all tokens share, nor those that compute nothing.
_EXPERTS = re.compile(r"(?!.*(shared|per_tok|top|zero)).*experts")


def _holding(text: Any, names: tuple[str, ...], count: int) -> list[str]:
    """Which of these numbers, or of those whose names begin so, are the count."""
    parts = [f"{n}." for n, part in vars(text).items() if isinstance(part, PreTrainedConfig)]
    inner = [part + name for part in parts for name in names]  # DBRX's attn_config.kv_n_heads
    own = [name for name in vars(text) if name.startswith(names)]
    every = dict.fromkeys((*own, *names, *inner))
    return [name for name in every if _is_count(_get(text, name), count, name)]


def _is_count(value: Any, count: int, name: str) -> bool:
    if isinstance(value, (list, tuple)) and value:
        return all(isinstance(v, int) and v == count for v in value) and "types" not in name
    return isinstance(value, int) and not isinstance(value, bool) and value == count


def _get(text: Any, name: str) -> Any:
    part, _, leaf = name.rpartition(".")
    return read(read(text, part) if part else text, leaf)


def _set(text: Any, name: str, value: Any) -> None:
    """Set one number, every entry of a list of them, or the list."""
    part, _, leaf = name.rpartition(".")
    holder = getattr(text, part) if part else text
    before = read(holder, leaf)
    listed = isinstance(before, (list, tuple))
    if listed:
        value = type(before)(value if isinstance(value, list) else [value] * len(before))
    setattr(holder, leaf, value)


def on_meta(kind: type[nn.Module], config: Any) -> Any:
    with torch.device("meta"), no_init_weights():
        return kind(copy.deepcopy(config))


# --- budgets ------------------------------------------------------------------------------------


def parameters_with(model: Any, kind: Kind, counts: Mapping[str, int]) -> int | None:
    """How many parameters a stock model with so many units has; None if there is none."""
    anatomy = Anatomy.of(model)
    sites = sites_of(anatomy, [kind])
    for form, config, _ in _smaller_forms(model, sites, counts):
        try:
            smaller = on_meta(form, config)
        except Exception:  # whatever a config or a constructor may raise
            continue
        before, after = ({k: t.shape for k, t in m.state_dict().items()} for m in (model, smaller))
        axes = list(shrunk_axes(anatomy, before, after, sites, counts))
        if axes and all(axis.layouts for axis in axes):
            smaller.tie_weights()
            return sum(p.numel() for p in smaller.parameters())
    return None


def _check_shapes(stock: Stock, shapes: Shapes) -> None:
    try:
        wanted = {k: t.shape for k, t in on_meta(stock.kind, stock.config).state_dict().items()}
    except Exception as error:
        raise UnsupportedModel(
            f"transformers cannot build {stock.kind.__name__} of the remaining layers: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        ) from error
    if wanted != shapes:
        odd = sorted(wanted.keys() ^ shapes.keys()) or ["shapes"]
        raise UnsupportedModel(
            f"{stock.kind.__name__} with the remaining layers has other tensors ({odd[0]})"
        )
