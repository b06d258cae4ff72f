"""Training that goes past the forward which chooses tokens: noticed, and said.

Who patches a model's `forward` after we did may run its decoder without ever calling ours (trl's
trainers do), and who takes the labels away computes a loss of his own (label smoothing does). Both
then train every token at the full cost, and nothing else would tell.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pliant.adapters.hooks import Patch


class _Inside(threading.local):
    """Whose patched forward is running in this thread."""

    def __init__(self) -> None:
        self.of: tuple[Any, ...] = ()


_INSIDE = _Inside()


@contextmanager
def inside(adapter: Any) -> Iterator[None]:
    before = _INSIDE.of
    _INSIDE.of = (*before, adapter)
    try:
        yield
    finally:
        _INSIDE.of = before


def happens(adapter: Any, model: nn.Module) -> bool:
    """Whether the decoder is run by a forward that was put in place of ours."""
    if any(adapter is one for one in _INSIDE.of):
        return False
    return not isinstance(vars(model).get("forward"), Patch)


def within_another(adapter: Any) -> bool:
    """Whether another one that is attached to the same model is acting, around this one."""
    others = (one for one in _INSIDE.of if one is not adapter)
    return any(one.base is adapter.base for one in others)


def past_forward(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} is trained past its forward, which chooses tokens: all of them "
        "are trained, at the full cost. trl's trainers do this: take pliant.gradients.training's "
        "SelectiveMixin, as in class MySFT(SelectiveMixin, SFTTrainer)."
    )


def without_labels(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} is trained without being told its labels, so its loss is "
        "computed elsewhere, from every token (label_smoothing_factor and compute_loss_func do "
        "this). Leave these out, and pass the labels to the model."
    )
