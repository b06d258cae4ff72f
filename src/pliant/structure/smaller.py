"""A stock model with fewer units of one kind: its config, and the slices of every tensor.

Nothing here knows an architecture. A smaller config is one of the same class in which some numbers
that were the old count are the new one. A model built of it shows by its shapes which axes have
shrunk. Where an axis may be laid out in several ways (query, key and value in one matrix, one after
the other or head by head), each way is a candidate, and the caller compares outputs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations, islice, product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedConfig

from pliant.anatomy import Anatomy
from pliant.anatomy.blocks import HEAD_COUNTS, HEAD_WIDTHS, KV_COUNTS
from pliant.anatomy.config import config_of_layers, read
from pliant.anatomy.find import path_of
from pliant.errors import UnsupportedModel
from pliant.structure.config import Kind
from pliant.structure.units import Site, sites_of

State = dict[str, Tensor]
Shapes = Mapping[str, torch.Size]
MOST_LAYOUTS = 32
MULTIPLE = 8
"""Matrix kernels prefer such widths."""


@dataclass(frozen=True, eq=False)
class Stock:
    """A stock model that is not compared with its original yet."""

    config: Any
    kind: type[nn.Module]
    state: State

    def build(self) -> Any:
        """The model, in eval mode; its tensors are those of `state`, and none is allocated."""
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):  # rotary frequencies are in no state
            model: Any = self.kind(copy.deepcopy(self.config))
        model.load_state_dict(self.state, strict=False, assign=True)
        model.tie_weights()
        if missing := [name for name, p in model.named_parameters() if p.is_meta]:
            raise UnsupportedModel(f"{self.kind.__name__}: nothing gives it its {missing[0]}")
        return model.eval()


def without_layers(model: Any, remaining: list[int]) -> Stock:
    """The model with these layers alone."""
    anatomy = Anatomy.of(model)
    depth = len(anatomy.layers)
    config = config_of_layers(model.config, depth, remaining)
    paths = [path_of(model, layer) for layer in anatomy.layers]
    stack = {str(p).rpartition(".")[0] for p in paths}
    if len(stack) != 1 or None in paths:
        raise UnsupportedModel(f"{type(model).__name__}: its layers are no single stack")
    new = {f"{paths[old]}.": f"{paths[i]}." for i, old in enumerate(remaining)}
    state: State = {}
    for key, tensor in model.state_dict().items():
        old = next((f"{path}." for path in paths if key.startswith(f"{path}.")), None)
        if old is None:
            state[key] = tensor
        elif old in new:
            state[new[old] + key.removeprefix(old)] = tensor
    stock = Stock(config, type(model), state)
    _check_keys(stock)
    return stock


def with_fewer(model: Any, kind: Kind, remaining: Mapping[str, Tensor]) -> Iterator[Stock]:
    """Candidates for the model with these units alone, by a site's key.

    For heads the units are groups that share a KV head; where all heads share one, they are heads.
    """
    anatomy = Anatomy.of(model)
    sites = sites_of(anatomy, [kind])
    counts = {site.key: len(remaining[site.key]) for site in sites}
    why, any_fits = "no number of its config is their count", False
    for form, config in _smaller_forms(model, sites, counts):
        try:
            config.validate()
            shapes = {k: t.shape for k, t in _on_meta(form, config).state_dict().items()}
        except Exception as error:  # whatever a config or a constructor may raise
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        axes = list(_shrunk_axes(anatomy, model.state_dict(), shapes, sites, counts))
        if not axes or any(axis.layouts is None for axis in axes):
            continue
        layouts = list(dict.fromkeys((axis.name, axis.layouts or ()) for axis in axes))
        for choice in islice(product(*(options for _, options in layouts)), MOST_LAYOUTS):
            chosen = dict(zip((name for name, _ in layouts), choice, strict=True))
            state = dict(model.state_dict())
            for axis in axes:
                index = chosen[axis.name](remaining[axis.site.key])
                old = state[axis.key]
                state[axis.key] = old.index_select(axis.axis, index.to(old.device))
            if all(state[k].shape == shape for k, shape in shapes.items()):
                any_fits = True
                yield Stock(config, form, state)
    if not any_fits:
        raise UnsupportedModel(
            f"{type(model).__name__} has no stock form with {next(iter(counts.values()))} {kind} "
            f"in every layer ({why})"
        )


# --- configs -------------------------------------------------------------------------------------


def _smaller_forms(
    model: Any, sites: list[Site], counts: Mapping[str, int]
) -> Iterator[tuple[type[nn.Module], Any]]:
    """Classes with smaller configs: the model's own class, and then Mistral's.

    A Llama insists that its hidden size is a multiple of its heads, and a Mistral, which computes
    the same, does not. A model that is no Llama has other tensors, or fails the comparison.
    """
    for config in _smaller_configs(model, sites, counts):
        yield type(model), config
    for config in _smaller_configs(model, sites, counts):
        names = vars(MistralConfig()).keys() - {"architectures", "transformers_version"}
        same = {k: v for k, v in vars(config).items() if k in names and not k.startswith("_")}
        try:
            mistral = MistralConfig(**{**same, "sliding_window": None})
        except Exception:  # a config with other kinds of numbers
            return
        yield MistralForCausalLM, mistral


def _smaller_configs(model: Any, sites: list[Site], counts: Mapping[str, int]) -> Iterator[Any]:
    """Configs in which some numbers are smaller, the likeliest first."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)  # left over from a GGUF file
    text = config.get_text_config(decoder=True)
    if sites[0].kind == "heads":
        changes = _head_changes(text, sites, counts)
    else:
        changes = _width_changes(text, sites[0], counts[sites[0].key])
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


def _width_changes(text: Any, site: Site, count: int) -> Iterator[dict[str, Any]]:
    names = [name for name, value in vars(text).items() if _is_count(value, site.count, name)]
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


_INNER = re.compile(r"inner|intermediate|ffn|d_ff")


def units_of(site: Site) -> int:
    """The units that can be removed: KV groups, or heads where one KV head serves all."""
    return site.groups if site.kind == "heads" and site.groups > 1 else site.count


def removed_of(site: Site, share: float) -> int:
    """How many units of the site a share is; of many channels a multiple of 8 stays."""
    units = units_of(site)
    remaining = units - round(share * units)
    if site.kind == "channels" and remaining > MULTIPLE**2:
        remaining = round(remaining / MULTIPLE) * MULTIPLE
    return units - remaining


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
    """Set one number, or every entry of a list of them."""
    part, _, leaf = name.rpartition(".")
    holder = getattr(text, part) if part else text
    before = read(holder, leaf)
    listed = isinstance(before, (list, tuple))
    setattr(holder, leaf, type(before)([value] * len(before)) if listed else value)


def _on_meta(kind: type[nn.Module], config: Any) -> Any:
    with torch.device("meta"):
        return kind(copy.deepcopy(config))


# --- axes ----------------------------------------------------------------------------------------

Layout = Callable[[Tensor], Tensor]
"""From remaining units to remaining indices of an axis."""


@dataclass(frozen=True, eq=False)
class _Axis:
    key: str
    name: str
    """The key without the layer, the axis, its size and units: laid out alike in such layers."""
    axis: int
    site: Site
    layouts: tuple[Layout, ...] | None
    """None if no layout fits: it shrank by something else."""


def _shrunk_axes(
    anatomy: Anatomy, state: State, shapes: Shapes, sites: list[Site], counts: Mapping[str, int]
) -> Iterator[_Axis]:
    by_layer = {site.layer: site for site in sites}
    paths = [f"{path_of(anatomy.model, layer)}." for layer in anatomy.layers]
    if state.keys() != shapes.keys():
        yield _Axis("", "", 0, sites[0], None)
        return
    for key, shape in shapes.items():
        old = state[key].shape
        if old == shape:
            continue
        layer = next((i for i, path in enumerate(paths) if key.startswith(path)), None)
        site = None if layer is None else by_layer.get(layer)
        if site is None or len(old) != len(shape):
            yield _Axis(key, key, 0, sites[0], None)
            continue
        for axis, (a, b) in enumerate(zip(old, shape, strict=True)):
            if a != b:
                name = f"{key.removeprefix(paths[site.layer])} {axis} {a} {units_of(site)}"
                heads = site.count if site.kind == "heads" else 0
                layouts = _layouts(units_of(site), heads, site.width, a, b, counts[site.key])
                yield _Axis(key, name, axis, site, layouts or None)


@cache
def _layouts(
    units: int, heads: int, width: int, before: int, after: int, count: int
) -> tuple[Layout, ...]:
    """The ways in which an axis of `before` may hold the units and shrink to `after`.

    `heads` is their number in all, 0 if the units are no heads, and `width` that of one.
    """
    layouts: list[Layout] = []
    if before * count == after * units:
        each = before // units
        group = heads // units
        if heads and each == (group + 2) * width:  # queries, keys, values; or all three by group
            layouts.append(_segments([units * group * width, *[units * width] * 2], units))
        if not heads and each == 2:  # gate and up, or one of each in turn
            layouts.append(_segments([units, units], units))
        layouts.append(_segments([before], units))
    elif heads and before - after == (units - count) * width:  # all queries, then what they share
        layouts.append(_segments([units * width], units, tail=before - units * width))
    return tuple(layouts)


def _segments(sizes: list[int], units: int, tail: int = 0) -> Layout:
    """Segments one after the other, each with the units in order; then a `tail` that stays."""

    def indices(remaining: Tensor) -> Tensor:
        parts, start = [], 0
        for size in sizes:
            each = size // units
            parts.append((remaining[:, None] * each + torch.arange(each)).flatten() + start)
            start += size
        parts.append(torch.arange(start, start + tail))
        return torch.cat(parts)

    return indices


def parameters_with(model: Any, kind: Kind, counts: Mapping[str, int]) -> int | None:
    """How many parameters a stock model with so many units has; None if there is none."""
    anatomy = Anatomy.of(model)
    sites = sites_of(anatomy, [kind])
    for form, config in _smaller_forms(model, sites, counts):
        try:
            smaller = _on_meta(form, config)
        except Exception:  # whatever a config or a constructor may raise
            continue
        shapes = {k: t.shape for k, t in smaller.state_dict().items()}
        axes = list(_shrunk_axes(anatomy, model.state_dict(), shapes, sites, counts))
        if axes and all(axis.layouts for axis in axes):
            smaller.tie_weights()
            return sum(p.numel() for p in smaller.parameters())
    return None


def _check_keys(stock: Stock) -> None:
    try:
        wanted = {k: t.shape for k, t in _on_meta(stock.kind, stock.config).state_dict().items()}
    except Exception as error:
        raise UnsupportedModel(
            f"transformers cannot build {stock.kind.__name__} of the remaining layers: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        ) from error
    if wanted != {k: t.shape for k, t in stock.state.items()}:
        odd = sorted(wanted.keys() ^ stock.state.keys()) or ["shapes"]
        raise UnsupportedModel(
            f"{stock.kind.__name__} with the remaining layers has other tensors ({odd[0]})"
        )
