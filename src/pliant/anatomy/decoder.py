"""The decoder, then the head: a model's own forward in two pieces.

    decoded = run_decoder(anatomy, inputs)                # the head is not computed
    output = run_head(anatomy, with_hidden(decoded, rows), inputs)

Nothing of the model is written anew: its own code makes masks and positions, and scales, caps and
casts the logits. Only what its decoder returns is intercepted on the way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pliant.anatomy.anatomy import Anatomy
from pliant.anatomy.intercept import CALL, Handler, Target, intercept
from pliant.errors import UnsupportedModel

Forward = Callable[..., Any]
Handlers = Mapping[Target, Handler]


class Stopped(BaseException):
    """The decoder is done. Not an Exception: no model's own `except` may take it for an error."""

    def __init__(self, output: Any) -> None:
        self.output = output


def run_decoder(
    anatomy: Anatomy,
    inputs: dict[str, Any],
    *,
    forward: Forward | None = None,
    handlers: Handlers | None = None,
) -> Any:
    """What the decoder returns for these inputs; the model is stopped before its head.

    `forward` is the model's own where something has replaced it; `handlers` answer for modules.
    """

    def stop(original: Forward, args: Any, kwargs: Any) -> Any:
        raise Stopped(original(*args, **kwargs))

    try:
        with intercept({(anatomy.decoder, CALL): stop, **(handlers or {})}):
            (forward or anatomy.model)(**inputs)
    except Stopped as stopped:
        return stopped.output
    raise no_decoder_call(anatomy)


def run_both(anatomy: Anatomy, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """What the decoder returns, and the model's whole output."""
    decoded: list[Any] = []

    def record(original: Forward, args: Any, kwargs: Any) -> Any:
        decoded.append(original(*args, **kwargs))
        return decoded[-1]

    with intercept({(anatomy.decoder, CALL): record}):
        output = anatomy.model(**inputs)
    if not decoded:
        raise no_decoder_call(anatomy)
    return decoded[-1], output


def run_head(
    anatomy: Anatomy,
    decoded: Any,
    inputs: dict[str, Any],
    *,
    forward: Forward | None = None,
    handlers: Handlers | None = None,
) -> Any:
    """The model's whole output, as if its decoder had returned `decoded`."""

    def answer(original: Forward, args: Any, kwargs: Any) -> Any:
        return decoded

    with intercept({(anatomy.decoder, CALL): answer, **(handlers or {})}):
        return (forward or anatomy.model)(**inputs)


def last_hidden_state(decoded: Any) -> Tensor:
    """What a decoder returns first, as a tuple or by name."""
    return decoded[0] if isinstance(decoded, tuple) else decoded.last_hidden_state


def with_hidden(decoded: Any, hidden: Tensor) -> Any:
    """The decoder's output with other hidden states in it: no cache, and the rest as it is."""
    if isinstance(decoded, tuple):
        return (hidden, *decoded[1:])
    exchanged = copy.copy(decoded)
    exchanged["last_hidden_state"] = hidden
    return exchanged


def no_decoder_call(anatomy: Anatomy) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(anatomy.model).__name__}: its forward never called the decoder that was found "
        f"({type(anatomy.decoder).__name__}), so it cannot be stopped before its head. Name the "
        'decoder by hand: Anatomy.of(model, decoder="model")'
    )
