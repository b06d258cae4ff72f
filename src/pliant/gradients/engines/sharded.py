"""Weights that are whole only while their module runs: FSDP2's shards, and DeepSpeed's ZeRO-3.

All processes must then run the same modules equally often: whoever runs one more waits for the
others to lend their shards, and for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pliant.anatomy import Anatomy
from pliant.anatomy.detour import CALL, Handler, detours


def is_sharded(anatomy: Anatomy) -> bool:
    """Whether the layers' weights are gone between their runs."""
    weights = list(anatomy.layers[0].parameters())
    return any(hasattr(p, "full_tensor") or _is_partitioned(p) for p in weights)


@contextmanager
def head_at_hand(anatomy: Anatomy) -> Iterator[None]:
    """Each process may run its head as often as its own tokens take: under ZeRO-3 its weights are
    brought together once, and its modules run without the hooks that would do so each time."""
    head = anatomy.head
    weights = [p for p in head.parameters() if _is_partitioned(p)] if head is not None else []
    if head is None or not weights:
        yield
        return
    from deepspeed.zero import GatheredParameters

    with GatheredParameters(weights), detours({(m, CALL): _bare(m) for m in head.modules()}):
        yield


def _bare(module: nn.Module) -> Handler:
    def answer(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return module.forward(*args, **kwargs)

    return answer


def _is_partitioned(weight: nn.Parameter) -> bool:
    return hasattr(weight, "ds_id")
