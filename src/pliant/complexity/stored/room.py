"""Keys and values with room behind them: the rows' own are written there, and nothing is copied.

A layer of a cache grows by `torch.cat([kept, new])`, which copies all that was kept: a quarter of a
training step at 1,024 tokens. What is kept here answers that one call by writing the new
ones behind itself, once; asked again it is copied as any tensor is. To everything else, and to
autograd, it is what it seems.

Shapes: B prompts, H heads, T positions, r rows, K features of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Roomy(Tensor):
    """The first positions of a (B, H, T + r, K) tensor, of which the rest may be written once."""

    whole: list[Tensor]
    """The tensor with its room; empty once that is taken."""

    @classmethod
    def of(cls, whole_BHTK: Tensor, kept: int) -> Tensor:
        """`whole` without its room; as it is where it has none."""
        if whole_BHTK.shape[2] <= kept:
            return whole_BHTK
        roomy = whole_BHTK[:, :, :kept].as_subclass(cls)
        roomy.whole = [whole_BHTK]
        return roomy

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.cat and (written := _written(*args, **(kwargs or {}))) is not None:
                return written
            return func(*args, **(kwargs or {}))


class _Behind(torch.autograd.Function):
    """`new` in the room of a tensor; its gradient is that of its own positions."""

    @staticmethod
    def forward(ctx: Any, new_BHrK: Tensor, whole: list[Tensor], kept: int) -> Tensor:
        ctx.kept, stop = kept, kept + new_BHrK.shape[2]
        whole[0][:, :, kept:stop] = new_BHrK
        return whole[0][:, :, :stop]

    @staticmethod
    def backward(ctx: Any, grad_BHTK: Tensor) -> tuple[Tensor, None, None]:
        return grad_BHTK[:, :, ctx.kept :], None, None


def _written(tensors: Any, dim: int = 0, **options: Any) -> Tensor | None:
    """What `torch.cat` would give; None where the room is no answer to what it was asked."""
    if options or len(tensors) != 2 or dim not in (-2, 2) or not isinstance(tensors[0], Roomy):
        return None
    kept, new = tensors
    try:
        whole = kept.whole.pop()  # of two threads, one gets it
    except IndexError:
        return None
    fits = whole[:, :, kept.shape[2] :][:, :, : new.shape[2]].shape == new.shape
    if not fits or (whole.dtype, whole.device) != (new.dtype, new.device):
        kept.whole.append(whole)
        return None
    found: Tensor = _Behind.apply(new, [whole], kept.shape[2])
    return found
