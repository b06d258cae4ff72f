"""Weights that are whole only while their module runs: FSDP2's shards, and DeepSpeed's ZeRO-3.

All processes must then run the same modules equally often: one that runs a module more often waits
for the shards of the others for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.anatomy.intercept import CALL, FORWARD, intercept

Result = TypeVar("Result")


def is_sharded(anatomy: Anatomy) -> bool:
    """Whether the layers' weights are gone between their runs."""
    return _in_shards(anatomy.layers[0])


def while_head_runs(anatomy: Anatomy, hidden_BTD: Tensor, look: Callable[[], Result]) -> Result:
    """The result of `look`, which runs the head as often as this process' own tokens need.

    A head in shards runs once for all of it: its hooks bring its weights together before and take
    them apart after, and inside it runs without them. One that shares its shards with the last norm
    (as accelerate makes them) is whole since that ran, and its hooks count every run.
    """
    head = anatomy.head
    if head is None or not (_in_shards(head) or hasattr(head, "unshard")):
        return look()
    if not _in_shards(head):
        with _without_hooks(head):
            return look()
    results: list[Result] = []

    def answer(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with _without_hooks(head):
            results.append(look())
        return args[0]

    with torch.no_grad(), intercept({(head, FORWARD): answer}):
        head(hidden_BTD[:1, :1].detach())
    return results[0]


@contextmanager
def _without_hooks(head: nn.Module) -> Iterator[None]:
    before = vars(head).get(CALL)
    setattr(head, CALL, lambda *args, **kwargs: head.forward(*args, **kwargs))
    try:
        yield
    finally:
        delattr(head, CALL)
        if before is not None:
            setattr(head, CALL, before)


def _in_shards(module: nn.Module) -> bool:
    return any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in module.parameters())
