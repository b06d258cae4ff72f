"""Costs with their units, as people read them: $0.0012, 3.4 ms, 56.1 MFLOPs, 120 tokens."""

from __future__ import annotations

import math
from collections.abc import Collection

UNITS = ("tokens", "usd", "ms", "flops", "calls")
TOKENIZERS = (
    "Each model counts tokens with its own tokenizer, so sums and ratios over models are rough."
)
"""To be shown wherever tokens of several models are compared or added."""
ONE = {"tokens": "token", "usd": "dollar", "ms": "ms", "flops": "FLOP", "calls": "call"}
"""What a price of cost is per."""
_SCALES = ("", "k", "M", "G", "T", "P")
_FLOPS = ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs")


def amount(cost: float, unit: str) -> str:
    """A cost in about three figures, with its unit."""
    if not math.isfinite(cost):
        return f"{cost} {unit}"
    sign, size = "-" if cost < 0 else "", abs(cost)
    if unit == "usd":
        return f"{sign}${size:,.2f}" if 1 <= size < 1e6 else f"{sign}${_figures(size)}"
    if unit == "flops":
        scale = _scale(size)
        return f"{sign}{size / 1000**scale:.3g} {_FLOPS[scale]}"
    if unit == "ms" and size >= 10_000:
        return f"{sign}{_figures(size / 1000)} s"
    return f"{sign}{_figures(size)} {ONE[unit] if size == 1 else unit}"


def saving(saved: float, unit: str, strongest: str) -> str:
    """What was saved against asking the strongest model, in words where it is not more than
    nothing."""
    if saved == 0:
        return f"as much as {strongest} alone"
    if saved < 0:
        return f"{amount(-saved, unit)} more than {strongest} alone"
    return f"saved {amount(saved, unit)}"


def same_price(costs: Collection[float]) -> bool:
    """Whether all of these are equal, up to rounding: then a router saves nothing, whatever it
    chooses."""
    return max(costs) <= min(costs) * (1 + 1e-9)


def percent(share: float) -> str:
    """A share of 1, to a tenth of a percent."""
    return f"{100 * share:.1f} %"


def _figures(size: float) -> str:
    """812, 4.06k, 1.24M; small ones as they are."""
    if size < 1000:
        return f"{size:.3g}" if size < 999.5 else "1k"
    scale = _scale(size)
    return f"{size / 1000**scale:.3g}{_SCALES[scale]}"


def _scale(size: float) -> int:
    """How many times a thousand, so that three figures are below a thousand."""
    scale = 0
    while size >= 999.5 and scale < len(_SCALES) - 1:
        size, scale = size / 1000, scale + 1
    return scale
