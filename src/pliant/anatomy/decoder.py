"""Run a model's decoder and its head separately.

    decoded = run_decoder(anatomy, inputs)                # the head is not computed
    output = run_head(anatomy, with_hidden(decoded, rows), inputs)

Both are the model's own forward, which makes masks and positions, and scales, caps and casts the
logits; only the decoder's output is intercepted.
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
    """The decoder has returned. Not an Exception, so that no model's `except` can catch it."""

    def __init__(self, output: Any) -> None:
        self.output = output


def run_decoder(
    anatomy: Anatomy,
    inputs: dict[str, Any],
    *,
    forward: Forward | None = None,
    handlers: Handlers | None = None,
) -> Any:
    """The decoder's output for these inputs; the model is stopped before its head.

    `forward` is the model's own forward, if it has been replaced; `handlers` intercept modules.
    """

    def stop(original: Forward, args: Any, kwargs: Any) -> Any:
        raise Stopped(original(*args, **kwargs))

    try:
        with intercept({(anatomy.decoder, CALL): stop, **(handlers or {})}):
            (forward or anatomy.model)(**inputs)
    except Stopped as stopped:
        return stopped.output
    raise no_decoder_call(anatomy)


def run_both(
    anatomy: Anatomy, inputs: dict[str, Any], *, handlers: Handlers | None = None
) -> tuple[Any, Any]:
    """The decoder's output and the model's output."""
    decoded: list[Any] = []

    def record(original: Forward, args: Any, kwargs: Any) -> Any:
        decoded.append(original(*args, **kwargs))
        return decoded[-1]

    with intercept({(anatomy.decoder, CALL): record, **(handlers or {})}):
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
    """The model's output, as if its decoder had returned `decoded`."""

    def answer(original: Forward, args: Any, kwargs: Any) -> Any:
        return decoded

    with intercept({(anatomy.decoder, CALL): answer, **(handlers or {})}):
        return (forward or anatomy.model)(**inputs)


def last_hidden_state(decoded: Any) -> Tensor:
    """The hidden state in a decoder's output, which may be a tuple."""
    return decoded[0] if isinstance(decoded, tuple) else decoded.last_hidden_state


def with_hidden(decoded: Any, hidden: Tensor) -> Any:
    """The decoder's output with its hidden states replaced."""
    if isinstance(decoded, tuple):
        return (hidden, *decoded[1:])
    replaced = copy.copy(decoded)
    replaced["last_hidden_state"] = hidden
    return replaced


def no_decoder_call(anatomy: Anatomy) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(anatomy.model).__name__}: its forward never called {type(anatomy.decoder).__name__}"
        ", taken for its decoder, so it cannot be stopped before its head. Name the decoder: "
        'Anatomy.of(model, decoder="model")'
    )
