"""A model's own forward in two pieces, counted: the backbone, and then the head on some rows alone.

Letters: B sequences of T positions, N chosen rows, D features, V entries of the vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.anatomy.decoder import (
    Handlers,
    last_hidden_state,
    run_decoder,
    run_head,
    with_hidden,
)
from pliant.anatomy.intercept import CALL, FORWARD, intercept
from pliant.errors import UnsupportedModel
from pliant.gradients.labelled_batch import source_of
from pliant.gradients.telemetry import OperationCount

Forward = Callable[..., Any]
Result = TypeVar("Result")


class SplitForward:
    """One model's forward, in pieces. `forward` is the one below whatever has replaced it."""

    def __init__(self, anatomy: Anatomy, forward: Forward) -> None:
        self.anatomy = anatomy
        self.forward = forward
        self.ledger = OperationCount()

    def backbone(self, inputs: dict[str, Any], handlers: Handlers | None = None) -> Any:
        """What the decoder returns for these inputs; the head is not run."""
        if handlers is None:  # handlers that answer for layers count what these run
            self.count(inputs)
        return run_decoder(self.anatomy, inputs, forward=self.forward, handlers=handlers)

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
        rows = last_hidden_state(decoded).shape[:-1].numel()
        share = 1.0 if instead is None else instead.share
        self.ledger.head(rows * share, live=torch.is_grad_enabled())
        handlers: Handlers = {}
        if instead is not None:
            assert self.anatomy.head is not None
            handlers = {(self.anatomy.head, FORWARD): instead}
        return run_head(self.anatomy, decoded, inputs, forward=self.forward, handlers=handlers)

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
    source = source_of(inputs)
    assert source is not None
    return int(source.shape[:2].numel())


def _is_checkpointing(anatomy: Anatomy) -> bool:
    some = (anatomy.decoder, anatomy.layers[0])
    return any(getattr(module, "gradient_checkpointing", False) is True for module in some)


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """The names of its forward's arguments, in order."""
    return _parameters_of(type(module).forward)


@functools.cache
def _parameters_of(forward: Forward) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def rows_of(hidden_BTD: Tensor, at_BK: Tensor, live_BK: Tensor) -> Tensor:
    """(N, D): the hidden states at those positions that are live, row after row."""
    index = at_BK.unsqueeze(-1).expand(-1, -1, hidden_BTD.shape[-1])
    picked = hidden_BTD.gather(1, index)
    return picked[live_BK]


def detached(value: Any) -> Any:
    """A layer's answer, whatever holds it, out of the graph."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(detached(part) for part in value)
    return value


# --- sharded weights ------------------------------------------------------------------------------

# FSDP2's shards, and DeepSpeed's ZeRO-3, are whole only while their module runs. All processes must
# then run the same modules equally often: one that runs a module more often waits for the shards of
# the others for ever.


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
