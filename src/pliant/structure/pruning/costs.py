"""What a model costs: its parameters, operations, cache or time; and what removing units saves.

    costs = costs_of(model, ("channels", "heads", "layers"), "flops")
    costs.saved({"channels": 0.25, "layers": 0.1})     # the share of all operations

A smaller stock model is built for each part, and what it costs says what the part's units cost.
Parameters, operations and bytes are counted; latency is measured, in turns with the whole model.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pliant.anatomy import Anatomy
from pliant.anatomy.modes import eager_experts, eval_mode
from pliant.anatomy.trial import trial_ids
from pliant.errors import UnsupportedModel
from pliant.structure.config import PARTS, Part
from pliant.structure.stock.smaller import parameters_with, with_fewer, without_layers
from pliant.structure.units import Site, removed_of, sites_of, units_of

Cost = Literal["parameters", "flops", "kv", "latency"]
"""Parameters; operations of a prompt; the bytes of its keys and values; seconds for an answer."""
COSTS: tuple[Cost, ...] = get_args(Cost)

PROMPT, ANSWER = 128, 16
"""Tokens of the prompt and of the answer that are measured."""
ROUNDS = 7


@dataclass(frozen=True)
class Costs:
    """What a whole model costs, and how much of it each part does.

    Units inside layers save what they cost in the layers that remain.
    """

    of: Cost
    whole: float
    parts: Mapping[Part, float]
    """What all channels cost, all heads, ..., all layers. A part without a smaller stock form is
    not among them."""
    why_not: Mapping[Part, str]
    """Why a part has no smaller stock form."""

    def saved(self, shares: Mapping[Part, Any]) -> Any:
        """The share of the whole cost that is saved by removing these shares of the parts."""
        layers = shares.get("layers", 0.0)
        inside = sum(
            share * self.parts.get(part, 0.0) for part, share in shares.items() if part != "layers"
        )
        return (inside * (1 - layers) + layers * self.parts.get("layers", 0.0)) / self.whole


def costs_of(model: Any, parts: Sequence[Part] = PARTS, of: Cost = "parameters") -> Costs:
    """What a model and its parts cost."""
    whole = 1.0 if of == "latency" else cost(model, of)
    measured: dict[Part, float] = {}
    why_not: dict[Part, str] = {}
    for part in parts:
        try:
            left, share = _of_half(model, part, of)
        except UnsupportedModel as error:
            why_not[part] = str(error)
        else:
            measured[part] = (whole - left) / share
    return Costs(of, whole, measured, why_not)


def cost(model: Any, of: Cost) -> float:
    """What one model costs; for latency, the median seconds."""
    if of == "parameters":
        return float(sum(p.numel() for p in model.parameters()))
    if of == "flops":
        return _operations(model)
    return _cache_bytes(model) if of == "kv" else median(_seconds(model) for _ in range(ROUNDS))


def latency_ratio(smaller: Any, whole: Any) -> float:
    """How long an answer takes, relative to the whole model: the median of paired rounds."""
    ratios = []
    for _ in range(ROUNDS + 1):
        ratios.append(_seconds(smaller) / _seconds(whole))
    return median(ratios[1:])  # the first round warms up


def latency_of(model: Any, shares: Mapping[Part, float]) -> float:
    """How long an answer takes without these shares, relative to the whole model."""
    return latency_ratio(sketch(model, shares), model)


def rounded(model: Any, shares: Mapping[Part, float]) -> dict[Part, float]:
    """The shares that really go, for units are whole."""
    anatomy = Anatomy.of(model)
    return {
        part: _rounded(sites_of(anatomy, [part]), share) for part, share in shares.items() if share
    }


def saved_parameters(model: Any, shares: Mapping[Part, float], layers: Collection[int]) -> float:
    """The share of all parameters that these shares are, if these layers go.

    Layers may differ in size, and `Costs` takes them for equal.
    """
    whole, depth = cost(model, "parameters"), len(Anatomy.of(model).layers)
    smaller = without_layers(model, [i for i in range(depth) if i not in layers]).skeleton()
    smaller.tie_weights()
    left = every = cost(smaller, "parameters")
    for part, share in shares.items():
        if share and part != "layers":
            sites = sites_of(Anatomy.of(smaller), [part])
            counts = {site.key: units_of(site) - removed_of(site, share) for site in sites}
            remaining = parameters_with(smaller, part, counts)
            if remaining is None:
                raise UnsupportedModel(f"{type(model).__name__} has no such form of {part}")
            left -= every - remaining
    return 1 - left / whole


def sketch(model: Any, shares: Mapping[Part, float]) -> Any:
    """A stock model of the size that remains; which units it has does not matter."""
    for part in PARTS:
        share = shares.get(part, 0.0)
        depth = len(Anatomy.of(model).layers)
        if share and part == "layers":
            model = without_layers(model, list(range(depth - round(share * depth)))).build()
        elif share:
            sites = sites_of(Anatomy.of(model), [part])
            indices = {s.key: torch.arange(units_of(s) - removed_of(s, share)) for s in sites}
            model = next(with_fewer(model, part, indices)).build()
    return model


def _of_half(model: Any, part: Part, of: Cost) -> tuple[float, float]:
    """What the model costs without half of a part, and which share of it that is exactly."""
    sites = sites_of(Anatomy.of(model), [part])
    share = _rounded(sites, 0.5)
    if not share:
        raise UnsupportedModel(f"{type(model).__name__} has no {part} to spare")
    if of == "parameters" and part != "layers":  # no tensor is needed to count them
        counts = {site.key: units_of(site) - removed_of(site, 0.5) for site in sites}
        left = parameters_with(model, part, counts)
        if left is None:
            raise UnsupportedModel(f"{type(model).__name__} has no stock form of fewer {part}")
        return float(left), share
    smaller = sketch(model, {part: 0.5})
    return latency_ratio(smaller, model) if of == "latency" else cost(smaller, of), share


def _rounded(sites: Sequence[Site], share: float) -> float:
    if sites[0].kind == "layers":
        return round(share * len(sites)) / len(sites)
    return sum(removed_of(site, share) for site in sites) / sum(map(units_of, sites))


# --- measures ------------------------------------------------------------------------------------


def _prompt(model: Any) -> Tensor:
    return trial_ids(Anatomy.of(model), PROMPT)[:1]


@torch.no_grad()
def _operations(model: Any) -> float:
    """Of a prompt, counted; as plain matrix products, which the counter knows."""
    counter = FlopCounterMode(display=False)
    with eval_mode(model), eager_experts(model), sdpa_kernel(SDPBackend.MATH), counter:
        model(input_ids=_prompt(model), use_cache=False)
    return float(counter.get_total_flops())


@torch.no_grad()
def _cache_bytes(model: Any) -> float:
    """Of every tensor in the cache of a prompt."""
    with eval_mode(model):
        output = model(input_ids=_prompt(model), use_cache=True)
    tensors: dict[int, Tensor] = {}
    for layer in getattr(getattr(output, "past_key_values", None), "layers", ()):
        tensors |= {id(t): t for t in vars(layer).values() if isinstance(t, Tensor)}
    if not tensors:
        raise UnsupportedModel(
            f"{type(model).__name__} keeps no keys and values: give another budget than kv"
        )
    return float(sum(t.numel() * t.element_size() for t in tensors.values()))


@torch.no_grad()
def _seconds(model: Any) -> float:
    """For a prompt and an answer of fixed lengths."""
    ids = _prompt(model)
    with eval_mode(model):
        _wait_for(ids.device)
        begun = time.perf_counter()
        out = model(input_ids=ids, use_cache=True)
        for _ in range(ANSWER):
            out = model(input_ids=ids[:, -1:], past_key_values=out.past_key_values, use_cache=True)
        _wait_for(ids.device)
    return time.perf_counter() - begun


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
