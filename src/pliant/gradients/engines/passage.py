"""A model's own forward, run in two pieces: the backbone, and then the head on some rows alone.

Nothing of the model is written anew: its own code makes the masks and the positions, scales, caps
and casts the logits, and adds what it adds. Only what its decoder returns is exchanged on the way:
rows for sequences. Letters: B sequences of T positions, N chosen rows, D features, V words.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.anatomy.depth import last_hidden_state
from pliant.anatomy.detour import CALL, FORWARD, Handler, Spot, detours
from pliant.errors import UnsupportedModel
from pliant.gradients.ledger import Ledger

Forward = Callable[..., Any]


class Passage:
    """One model's forward, in pieces. `forward` is the one below whatever patched it."""

    def __init__(self, anatomy: Anatomy, forward: Forward) -> None:
        self.anatomy = anatomy
        self.forward = forward
        self.ledger = Ledger()

    def backbone(
        self, inputs: dict[str, Any], handlers: Mapping[Spot, Handler] | None = None
    ) -> Any:
        """What the decoder returns for these inputs; the head is not run."""
        decoder = self.anatomy.decoder
        if handlers is None:  # whoever answers for layers counts what they run
            self.count(inputs)

        def stop(original: Forward, args: Any, kwargs: Any) -> Any:
            raise _Enough(original(*args, **kwargs))

        try:
            with detours({(decoder, CALL): stop, **(handlers or {})}):
                self.forward(**inputs)
        except _Enough as enough:
            return enough.output
        kind = type(self.anatomy.model).__name__
        raise UnsupportedModel(
            f"{kind}: its forward never called the decoder that was found, so the loss cannot be "
            "taken on some rows alone. Train it without selection."
        )

    def count(self, inputs: dict[str, Any]) -> None:
        """Enter one run of the whole backbone into the ledger."""
        live, again = torch.is_grad_enabled(), _is_checkpointing(self.anatomy)
        self.ledger.backbone(tokens_of(inputs), live=live, again=live and again)

    def head(
        self,
        decoded: Any,
        rows_ND: Tensor,
        inputs: dict[str, Any],
        instead: Instead | None = None,
    ) -> Any:
        """The model's whole output, as if its decoder had returned these rows as one sequence."""
        output = self.rest(with_hidden(decoded, rows_ND[None]), inputs, instead)
        logits = output[0] if isinstance(output, tuple) else output.logits
        if logits.shape[:-1].numel() != len(rows_ND):
            kind = type(self.anatomy.model).__name__
            raise UnsupportedModel(
                f"{kind}: its head makes logits of shape {tuple(logits.shape)} of {len(rows_ND)} "
                "hidden states, so its loss cannot be taken on some alone. Train it without "
                "selection."
            )
        return output

    def rest(self, decoded: Any, inputs: dict[str, Any], instead: Instead | None = None) -> Any:
        """The model's whole output, as if its decoder had returned this."""
        rows = hidden_of(decoded).shape[:-1].numel()
        share = 1.0 if instead is None else instead.share
        self.ledger.head(rows * share, live=torch.is_grad_enabled())

        def answer(original: Forward, args: Any, kwargs: Any) -> Any:
            return decoded

        handlers: dict[Spot, Handler] = {(self.anatomy.decoder, CALL): answer}
        if instead is not None:
            assert self.anatomy.head is not None
            handlers[self.anatomy.head, FORWARD] = instead
        with detours(handlers):
            return self.forward(**inputs)

    def logits(
        self,
        decoded: Any,
        rows_ND: Tensor,
        inputs: dict[str, Any],
        instead: Instead | None = None,
    ) -> Tensor:
        """(N, V), as the model would give them; or whatever answers for its head makes of them."""
        output = self.head(decoded, rows_ND, inputs, instead)
        logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
        return logits.reshape(rows_ND.shape[0], -1)


class Instead(Protocol):
    """Answers for the head, at this share of its cost."""

    share: float

    def __call__(self, original: Forward, args: Any, kwargs: Any) -> Tensor: ...


def tokens_of(inputs: dict[str, Any]) -> int:
    source = inputs.get("input_ids")
    source = inputs["inputs_embeds"] if source is None else source
    return int(source.shape[:2].numel())


def _is_checkpointing(anatomy: Anatomy) -> bool:
    some = (anatomy.decoder, anatomy.layers[0])
    return any(getattr(module, "gradient_checkpointing", False) is True for module in some)


class _Enough(BaseException):
    """The backbone is done. Not an Exception: no model's own `except` may take it for an error."""

    def __init__(self, output: Any) -> None:
        self.output = output


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """The names of its forward's arguments, in order."""
    return _parameters_of(type(module).forward)


@functools.cache
def _parameters_of(forward: Forward) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def with_hidden(decoded: Any, hidden: Tensor) -> Any:
    """The decoder's output with other hidden states in it: no cache, and the rest as it is."""
    if isinstance(decoded, tuple):
        return (hidden, *decoded[1:])
    exchanged = copy.copy(decoded)
    exchanged["last_hidden_state"] = hidden
    return exchanged


def hidden_of(decoded: Any) -> Tensor:
    return last_hidden_state(decoded)


def rows_of(hidden_BTD: Tensor, at_BK: Tensor, live_BK: Tensor) -> Tensor:
    """(N, D): the hidden states at those positions that are live, row after row."""
    index = at_BK.unsqueeze(-1).expand(-1, -1, hidden_BTD.shape[-1])
    picked = hidden_BTD.gather(1, index)
    return picked[live_BK]


@contextmanager
def without_checkpointing(anatomy: Anatomy) -> Iterator[bool]:
    """transformers' gradient checkpointing is off inside (it takes a layer's cache away); gives
    whether it was on."""
    marked = [
        module
        for module in anatomy.model.modules()
        if module.__dict__.get("gradient_checkpointing") is True
    ]
    for module in marked:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield bool(marked)
    finally:
        for module in marked:
            module.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def attention_by(anatomy: Anatomy, *kinds: str) -> Iterator[None]:
    """Attention is computed by one of these kinds inside: the first, if another is set."""
    configs = {id(c): c for c in (anatomy.config, getattr(anatomy.model, "config", None)) if c}
    before = {key: getattr(c, "_attn_implementation", None) for key, c in configs.items()}
    try:
        for key, config in configs.items():
            if before[key] is not None and before[key] not in kinds:
                config._attn_implementation = kinds[0]
        yield
    finally:
        for key, config in configs.items():
            if before[key] is not None and config._attn_implementation != before[key]:
                config._attn_implementation = before[key]


def detached(value: Any) -> Any:
    """A layer's answer, whatever holds it, out of the graph."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(detached(part) for part in value)
    return value
