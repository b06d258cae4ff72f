"""The scorer that is active in this thread, and the positions of its rows.

A scorer's hooks stay on its model but act only inside an `activated` block.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pliant.errors import UnsupportedModel


@dataclass(frozen=True)
class ActiveRows:
    """Rows `start` to `stop` of `scorer` are the last positions of a forward of shape (B, T)."""

    scorer: nn.Module
    start: int
    stop: int
    shape: tuple[int, int]

    @property
    def count(self) -> int:
        return self.stop - self.start

    def put(self, h: Tensor, rows: Tensor, module: nn.Module) -> Tensor:
        """`h` with the rows in place of its last positions."""
        axis = self._axis(h, module)
        at = self.shape[1] - self.count  # Reformer pads behind them
        rows = rows[self.start : self.stop].to(device=h.device, dtype=h.dtype)
        rows = (rows if axis == 1 else rows.unsqueeze(1)).expand_as(h.narrow(axis, at, self.count))
        if h.shape[axis] == self.count:  # all positions are rows
            return rows.clone()  # not the parameter itself: CTRL scales what it looked up in place
        behind = at + self.count
        parts = [h.narrow(axis, 0, at), rows, h.narrow(axis, behind, h.shape[axis] - behind)]
        return torch.cat(parts, dim=axis)

    def add(self, h: Tensor, x: Tensor, change: nn.Module, module: nn.Module) -> Tensor:
        """`h` with `change(x)` added at the rows' positions alone."""
        if h.dim() == 2:  # positions of all prompts in one row: some mixtures of experts
            return self._add_flat(h, x, change, module)
        axis = self._axis(h, module)
        # What is cached may come first, earlier rows too: DeepSeek expands its latents once more.
        count = self.count if h.shape[axis] == self.shape[1] else self.stop
        before = h.shape[axis] - count
        if not before and not torch.is_grad_enabled():  # a step on a cache: all positions are rows
            return h.add_(change(x).to(h.dtype))
        own = change(x.narrow(axis, before, count)).to(h.dtype)
        if not torch.is_grad_enabled():  # in place, for the prompt is long
            h.narrow(axis, before, count).add_(own)
            return h
        changed = h.narrow(axis, before, count) + own
        return torch.cat([h.narrow(axis, 0, before), changed], dim=axis)

    def _add_flat(self, h: Tensor, x: Tensor, change: nn.Module, module: nn.Module) -> Tensor:
        batch, length = self.shape
        if h.shape[0] != batch * length:
            raise _elsewhere(module, h)
        deep = self.add(h.unflatten(0, self.shape), x.unflatten(0, self.shape), change, module)
        return deep.flatten(0, 1)

    def _axis(self, h: Tensor, module: nn.Module) -> int:
        """The axis of positions: the last but one, or (XLNet) the first."""
        batch, length = self.shape
        for axis, of_batch in ((h.dim() - 2, 0), (0, 1)):
            if h.dim() > 2 and h.shape[of_batch] == batch and h.shape[axis] >= length:
                return axis
        raise _elsewhere(module, h)


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.rows: ActiveRows | None = None


_state = _ThreadState()


def active_rows(scorer: nn.Module) -> ActiveRows | None:
    """The rows of `scorer` that are active in this thread; None while it is not."""
    rows = _state.rows
    return rows if rows is not None and rows.scorer is scorer else None


@contextmanager
def activated(rows: ActiveRows) -> Iterator[None]:
    before, _state.rows = _state.rows, rows
    try:
        yield
    finally:
        _state.rows = before


def _elsewhere(module: nn.Module, h: Tensor) -> UnsupportedModel:
    return UnsupportedModel(
        f"a {type(module).__name__} returns {tuple(h.shape)}, in which the [CPX] positions cannot "
        "be located: leave it out of lora_targets"
    )
