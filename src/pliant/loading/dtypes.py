"""Which dtypes a model is loaded in, and which of them this machine computes slowly."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from pliant.errors import InvalidInput, SlowDtypeWarning, did_you_mean

if TYPE_CHECKING:
    import torch

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64", "float", "half", "double"]
"""Names of dtypes, those of torch; auto is the checkpoint's own."""
HALF, MUCH_SLOWER = ("bfloat16", "float16"), 1.5
"""Dtypes for which CPUs may have no units, and the slowdown from which there is a warning."""


def check_dtype(dtype: str | torch.dtype) -> None:
    """Refuse a name that is no dtype."""
    names = get_args(Dtype)
    if isinstance(dtype, str) and dtype not in names:
        near = did_you_mean(dtype, names) or f": give one of {', '.join(names)}"
        raise InvalidInput(f"{dtype!r} is not a dtype that models are loaded in{near}")


def warn_if_slow(model: Any) -> None:
    """Warn of a model on this CPU whose dtype is much slower than float32."""
    name = str(model.dtype).removeprefix("torch.")
    if model.device.type != "cpu" or name not in HALF:
        return
    if (slowdown := slowdown_of(model.dtype)) > MUCH_SLOWER:
        message = f"{name} takes {slowdown:.1f} times as long as float32 on this CPU"
        advice = 'load it in float32 (dtype="float32", or --dtype float32 where a command has it)'
        warnings.warn(f"{message}: {advice}", SlowDtypeWarning, stacklevel=4)


@contextmanager
def not_computed_here() -> Iterator[None]:
    """Load models that another device will compute, or that are only written: without the warning
    of a dtype that this CPU is slow in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowDtypeWarning)
        yield


@cache
def slowdown_of(dtype: torch.dtype) -> float:
    """How many times as long a matrix product takes on this CPU in `dtype` as in float32.

    CPUs without instructions for half precision convert every weight, every time.
    """
    import torch

    seconds = {dtype: float("inf"), torch.float32: float("inf")}
    for _ in range(5):  # in turns; the fastest is the least disturbed
        for kind in seconds:
            x, weight = torch.ones(256, 768, dtype=kind), torch.ones(768, 768, dtype=kind)
            began = time.perf_counter()
            x @ weight.T
            seconds[kind] = min(seconds[kind], time.perf_counter() - began)
    return seconds[dtype] / seconds[torch.float32]
