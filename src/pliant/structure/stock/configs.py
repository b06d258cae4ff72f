"""Configs with fewer units of one kind, and the classes that they are configs of.

Nothing here knows an architecture. A smaller config is one of the same class in which some numbers
that were the old count are the new one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations, islice
from typing import Any

import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from pliant.anatomy.blocks import HEAD_COUNTS, HEAD_WIDTHS, KV_COUNTS
from pliant.anatomy.config import read
from pliant.anatomy.recurrent import KEY_COUNTS, RECURRENT_COUNTS
from pliant.structure.units import Site, units_of


def smaller_forms(
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
    elif sites[0].kind == "recurrent_heads":
        changes = _recurrent_changes(text, sites, counts)
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


def _recurrent_changes(
    text: Any, sites: list[Site], counts: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    """The counts of heads and of their keys, and the total width where the config has one."""
    site, count, units = sites[0], counts[sites[0].key], units_of(sites[0])
    if len(set(counts.values())) > 1:
        return
    heads = count * site.count // units
    change: dict[str, Any] = dict.fromkeys(_holding(text, RECURRENT_COUNTS, site.count), heads)
    if not change:
        return
    if site.groups > 1:
        change |= dict.fromkeys(_holding(text, KEY_COUNTS, units), count)
    if read(text, "mamba_d_ssm") == site.count * site.width:
        change["mamba_d_ssm"] = heads * site.width
    yield change
    for ratios in _smaller_ratios(text, heads / site.count):
        yield change | ratios


def _smaller_ratios(text: Any, share: float) -> Iterator[dict[str, Any]]:
    for pattern in _RECURRENT_RATIOS:
        ratios = {n: v for n, v in vars(text).items() if pattern.fullmatch(n) and v}
        if ratios:
            yield {name: _times(value, share) for name, value in ratios.items()}


def why_no_ratio(model: Any, sites: list[Site], counts: Mapping[str, int]) -> str | None:
    """Which whole number of the config would have to be a fraction, if one would."""
    if sites[0].kind != "recurrent_heads":
        return None
    text = model.config.get_text_config(decoder=True)
    share = counts[sites[0].key] / units_of(sites[0])
    for ratios in _smaller_ratios(text, share):
        if not any(changed_configs(model.config, [ratios])):
            name, value = next(iter(ratios.items()))
            return f"{name} is a whole number, {read(text, name)}, and would be {value:g}"
    return None


def _times(value: float, share: float) -> float:
    """A whole number stays one where it can."""
    scaled = value * share
    return int(scaled) if isinstance(value, int) and scaled == int(scaled) else scaled


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


# Of the heads' width and the hidden size: Zamba's, xLSTM's.
_RECURRENT_RATIOS = (re.compile(r"(mamba_)?expand"), re.compile(r"(qk|v)_dim_factor"))
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
