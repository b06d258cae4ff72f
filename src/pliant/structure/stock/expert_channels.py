"""A stock model whose experts have fewer channels: as many in each, but not the same ones.

Experts are stacked: (E, outputs, channels), where a channel of the gate and the up projection may
lie in one axis, one after the other or in turn. Which of the two is left to the caller to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor

from pliant.anatomy import Anatomy
from pliant.anatomy.find import path_of
from pliant.structure.stock.configs import changed_configs, on_meta
from pliant.structure.stock.lazy_state import LazyState, State
from pliant.structure.stock.smaller import Stock
from pliant.structure.units import Site, sites_of

MOST_CONFIGS = 16


def stacked(site: Site) -> tuple[int, int] | None:
    """(experts, channels of one), if the site's experts are stacked in one parameter."""
    assert site.slices is not None
    parameter = getattr(site.slices.holder, site.slices.parameter)
    return (len(parameter), site.count // len(parameter)) if parameter.dim() == 3 else None


def with_fewer_expert_channels(
    model: Any, remaining: Mapping[str, Tensor], state: State
) -> Iterator[Stock]:
    """Candidates for the model in which expert e of a site has the channels `remaining[key][e]`.

    None if no number of the config is the channels' alone.
    """
    anatomy = Anatomy.of(model)
    sites = sites_of(anatomy, ["expert_channels"])
    sizes = {stacked(site) for site in sites}
    before = {key: tensor.shape for key, tensor in model.state_dict().items()}
    if len(sizes) != 1 or None in sizes:
        return
    ((_, channels),) = (size for size in sizes if size is not None)
    count = next(iter(remaining.values())).shape[1]
    paths = {f"{path_of(model, anatomy.layers[site.layer])}.": site.key for site in sites}
    text = model.config.get_text_config(decoder=True)
    names = [
        name
        for name, value in vars(text).items()
        if isinstance(value, int) and not isinstance(value, bool) and value == channels
    ]
    chosen = (own for size in (1, 2) for own in combinations(names, size))
    changes = (dict.fromkeys(own, count) for own in islice(chosen, MOST_CONFIGS))
    for config in changed_configs(model.config, changes):
        try:
            after = {k: t.shape for k, t in on_meta(type(model), config).state_dict().items()}
        except Exception:  # whatever a config or a constructor may raise
            continue
        for in_turn in (False, True):
            cuts = _cuts(before, after, paths, remaining, in_turn)
            if cuts:
                yield Stock(config, type(model), LazyState.over(state, cuts))


def _cuts(
    before: Mapping[str, torch.Size],
    after: Mapping[str, torch.Size],
    paths: Mapping[str, str],
    remaining: Mapping[str, Tensor],
    in_turn: bool,
) -> dict[str, Callable[[Tensor], Tensor]]:
    """What becomes of each tensor that has shrunk; empty if one has by something else."""
    cuts: dict[str, Callable[[Tensor], Tensor]] = {}
    if before.keys() != after.keys():
        return {}
    for key, shape in after.items():
        old = before[key]
        axes = [i for i, (a, b) in enumerate(zip(old, shape, strict=True)) if a != b]
        if not axes:
            continue
        at = next((own for path, own in paths.items() if key.startswith(path)), None)
        if at is None or len(axes) > 1 or axes[0] == 0 or old[0] != len(remaining[at]):
            return {}
        new = remaining[at].shape[1]
        each = shape[axes[0]] // new
        if each not in (1, 2) or each * new != shape[axes[0]]:
            return {}
        channels = old[axes[0]] // each
        cuts[key] = partial(_cut, axes[0], _indices(remaining[at], channels, each, in_turn))
    return cuts


def _indices(remaining: Tensor, channels: int, each: int, in_turn: bool) -> Tensor:
    """(E, n) entries of an axis that holds one value for each channel, or two."""
    if each == 1:
        return remaining
    if in_turn:
        return torch.stack([2 * remaining, 2 * remaining + 1], dim=2).flatten(1)
    return torch.cat([remaining, remaining + channels], dim=1)


def _cut(axis: int, index: Tensor, tensor: Tensor) -> Tensor:
    shape = [1] * tensor.dim()
    shape[0], shape[axis] = index.shape
    wanted = list(tensor.shape)
    wanted[axis] = index.shape[1]
    return tensor.gather(axis, index.to(tensor.device).view(shape).expand(wanted))
