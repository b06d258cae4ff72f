"""Run a model on many batches at once, layer after layer.

    def visit(index, calls):             # a LayerCall for each batch
        return [call() for call in calls]

    run_in_lockstep(anatomy, batches, visit)

All batches wait at a layer until `visit` has returned its output for each. So a layer can be
changed by what all batches show of it, before any of them goes on. The model's own forward runs, in
a thread for each batch, with its own masks and positions; layers run in the calling thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from pliant.anatomy.anatomy import Anatomy
from pliant.anatomy.decoder import run_decoder
from pliant.anatomy.intercept import CALL


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One batch's call of a layer; calling it computes the layer, as often as you like."""

    layer: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        """The layer's input."""
        hidden: torch.Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return hidden

    def __call__(self) -> Any:
        return self.layer(*self.args, **self.kwargs)


Visit = Callable[[int, Sequence[LayerCall]], Iterable[Any]]


@torch.no_grad()
def run_in_lockstep(anatomy: Anatomy, batches: Sequence[dict[str, Any]], visit: Visit) -> None:
    """Run the decoder on all batches; `visit(index, calls)` returns each batch's layer output."""
    runs = [_Run(anatomy, batch) for batch in batches]
    try:
        for index in range(len(anatomy.layers)):
            calls = [run.next_call() for run in runs]
            waiting = [call for call in calls if call is not None]
            if len(waiting) < len(calls):
                break  # a model may end early; it does so for every batch
            for run, output in zip(runs, visit(index, waiting), strict=True):
                run.answers.put(output)
        for run in runs:
            run.next_call()  # an error after the last layer is raised here
    finally:
        for run in runs:
            run.stop()


class _Abandoned(BaseException):
    """Ends a thread whose caller has stopped; no model's `except` catches it."""


class _Run(threading.Thread):
    """The model's forward on one batch, which stops at every layer until it gets its output."""

    def __init__(self, anatomy: Anatomy, inputs: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.anatomy, self.inputs = anatomy, inputs
        self.calls: SimpleQueue[LayerCall | BaseException | None] = SimpleQueue()
        self.answers: SimpleQueue[Any] = SimpleQueue()
        self.start()

    def next_call(self) -> LayerCall | None:
        """The layer that it waits at; None once it has ended."""
        if not self.is_alive() and self.calls.empty():
            return None
        call = self.calls.get()
        if isinstance(call, BaseException):
            raise call
        return call

    def stop(self) -> None:
        self.answers.put(_Abandoned())
        self.join()

    def run(self) -> None:
        handlers = {(layer, CALL): self._ask for layer in self.anatomy.layers}
        try:
            with torch.no_grad():  # each thread has its own mode
                run_decoder(self.anatomy, self.inputs, handlers=handlers)
        except _Abandoned:
            pass
        except BaseException as error:
            self.calls.put(error)
        self.calls.put(None)

    def _ask(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.calls.put(LayerCall(original, args, kwargs))
        answer = self.answers.get()
        if isinstance(answer, _Abandoned):
            raise answer
        return answer
