"""Which of several smaller models computes what the live one does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pliant.anatomy import Anatomy
from pliant.errors import PliantError, UnsupportedModel
from pliant.structure.config import GateConfig, Kind
from pliant.structure.exporting.remaining import remaining_layers
from pliant.structure.gates import Gates, attach
from pliant.structure.stock.smaller import Stock


def closest(
    candidates: Iterable[Stock], agree: Callable[[Any], float], kind: Kind, bound: float
) -> tuple[Stock, Any]:
    """The first candidate that computes the same, and the model that it builds.

    `agree` says by how much the logits of a model differ from what they should be.
    """
    best, why = float("inf"), ""
    for stock in candidates:
        model = stock.build()
        try:
            difference = agree(model)
        except (MemoryError, torch.OutOfMemoryError, OSError, PliantError):
            raise
        except Exception as error:  # whatever a model with numbers that do not fit may raise
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        best = min(best, difference)
        if difference <= bound:
            return stock, model
    if best == float("inf"):
        raise UnsupportedModel(f"a model with fewer {kind} does not run ({why})")
    raise UnsupportedModel(
        f"a model with fewer {kind} computes something else (by {best:.2g}): {_ELSEWHERE[kind]}"
    )


_ELSEWHERE: dict[str, str] = defaultdict(
    lambda: "their number enters elsewhere",
    recurrent_heads="a norm spans several of them, or others depend on what they compute",
)


@contextmanager
def layers_closed(model: Any, gates: list[Gates]) -> Iterator[None]:
    """Closes the layers of another model that these gates close."""
    depth = len(Anatomy.of(model).layers)
    closed = sorted(set(range(depth)) - set(remaining_layers(gates, depth)))
    if not closed:
        yield
        return
    own = attach(model, GateConfig(("layers",)))
    try:
        for i in closed:
            own["layers", i].zero_()
        yield
    finally:
        own.detach()
