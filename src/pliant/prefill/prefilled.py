"""The prompts that were run, with all that can be done on top of them.

Shapes: B prompts, T positions, r new ones, D features, V tokens of the vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.anatomy.cache_copy import copy_state
from pliant.anatomy.depth import cache_name, last_hidden_state
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.prefill.batch import Batch, align
from pliant.prefill.prefix import Prefix, joined, split
from pliant.prefill.run import (
    Entering,
    Ran,
    inputs_of,
    on_cache,
    on_top,
    run,
    run_layers,
    unnoticed,
)
from pliant.prefill.trials import groups, keeps_cache


def prefill(
    model: nn.Module | Anatomy,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: int | None = None,
    head: bool = True,
    resumable: bool = True,
    grad: bool = False,
    **inputs: Any,
) -> Prefilled:
    """Run a batch of prompts through `model`, or through its first `layers`.

    Padding may be on either side. Without `head` there are no logits, and with `resumable=False` an
    early exit keeps nothing for `resume`. `inputs` go to the model as they are.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    batch = align(input_ids, attention_mask)
    cached = keeps_cache(anatomy)
    parts = []
    with torch.set_grad_enabled(grad):
        for rows in groups(anatomy, batch):
            part = batch if rows is None else batch.take(rows)
            given = {**inputs_of(anatomy, part), **inputs, "use_cache": cached}
            if layers is None:
                ran = run(anatomy, given, head=head)
            else:
                ran = run_layers(anatomy, layers, given, resumable=resumable)
            parts.append(Part(rows, part, ran))
    return Prefilled(anatomy, layers, batch, tuple(parts), inputs)


@dataclass(frozen=True, eq=False)
class Prefilled:
    """What a model, or its first layers, made of a batch of prompts."""

    anatomy: Anatomy = field(repr=False)
    layers: int | None
    """How many layers ran; None for all."""
    batch: Batch
    parts: tuple[Part, ...] = field(repr=False)
    """One, unless the prompts had to be run in groups of equal length."""
    inputs: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def input_ids(self) -> Tensor:
        """The prompts, padded on the left."""
        return self.batch.ids_BT

    @property
    def attention_mask(self) -> Tensor:
        return self.batch.mask_BT

    @property
    def logits(self) -> Tensor | None:
        """(B, V) of the last token; None of an early exit, before `resume`."""
        return self._gathered(lambda part: part.ran.logits_BV)

    @property
    def hidden(self) -> Tensor | None:
        """(B, D) of the last token after the final norm, as if the model ended here."""
        return self._gathered(lambda part: part.ran.last_BD)

    @property
    def cache(self) -> Any:
        """A branch of the cache, to go on from; None where the model has none to rely on."""
        if len(self.parts) != 1:
            raise UnsupportedModel(
                f"{self._name} does not bear padding on the left, so these prompts of several "
                "lengths have no cache in common: run one length at a time"
            )
        return copy_state(self.parts[0].ran.cache)

    def step(self, ids: Tensor, entering: Entering = unnoticed) -> Tensor:
        """Run (B, r) ids on top of the prompts: their hidden states, (B, r, D), after the norm.

        The cache is afterwards as it was. Gradients flow to whatever hooks write at the new
        positions. `entering(i, j, shape)` is entered around the forward of positions i to j - 1.
        """
        if ids.dim() != 2 or ids.shape[0] != len(self.input_ids) or ids.shape[1] == 0:
            raise InvalidInput(
                f"ids must be of shape ({len(self.input_ids)}, 1 or more), not {tuple(ids.shape)}"
            )
        found = self._gathered(lambda part: part.step(self, part.of(ids), entering))
        assert found is not None
        return found

    def resume(self) -> Prefilled:
        """The rest of an early exit's prefill: bit for bit the whole model's, with logits."""
        if self.layers is None:
            return self
        parts = tuple(Part(p.rows, p.batch, _resumed(self.anatomy, p.ran)) for p in self.parts)
        return Prefilled(self.anatomy, None, self.batch, parts, self.inputs)

    def split(self) -> list[Prefix]:
        """Each prompt's keys and values, without padding; `join` puts them together again."""
        found: dict[int, Prefix] = {}
        for part in self.parts:
            rows = range(len(self.input_ids)) if part.rows is None else part.rows
            if part.ran.cache is None:
                raise UnsupportedModel(f"{self._name} has no cache that could be taken apart")
            found.update(zip(rows, split(part.ran.cache, part.batch, self._name), strict=True))
        return [found[row] for row in sorted(found)]

    @classmethod
    def join(
        cls, model: nn.Module | Anatomy, prefixes: Sequence[Prefix], *, layers: int | None = None
    ) -> Prefilled:
        """Prompts from `split`, of any lengths, ready for `step`; their ids are not known."""
        anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
        if not prefixes:
            raise InvalidInput("no prefixes to join: give at least one")
        longest = max(prefix.length for prefix in prefixes)
        mask = torch.tensor([[0] * (longest - p.length) + [1] * p.length for p in prefixes])
        whole, parts = Batch(torch.zeros_like(mask), mask), []
        for rows in groups(anatomy, whole):
            some = prefixes if rows is None else [prefixes[row] for row in rows]
            cache, batch = joined(anatomy, some)
            parts.append(Part(rows, batch, Ran(None, cache, "past_key_values")))
        place = parts[0].batch.ids_BT.device
        whole = Batch(whole.ids_BT.to(place), whole.mask_BT.to(place))
        return cls(anatomy, layers, whole, tuple(parts))

    def _gathered(self, of: Callable[[Part], Tensor | None]) -> Tensor | None:
        """Of each part, in the order of the prompts."""
        found = [of(part) for part in self.parts]
        if self.parts[0].rows is None or found[0] is None:
            return found[0]
        rows = [row for part in self.parts for row in part.rows or ()]
        gathered = torch.cat([one for one in found if one is not None])
        return gathered[torch.tensor(rows, device=gathered.device).argsort()]

    @property
    def _name(self) -> str:
        return type(self.anatomy.model).__name__


@dataclass(frozen=True, eq=False)
class Part:
    """Prompts that ran together."""

    rows: list[int] | None
    """Which of the batch; None for all, in order."""
    batch: Batch
    ran: Ran

    def of(self, ids: Tensor) -> Tensor:
        ids = ids.to(self.batch.ids_BT.device)
        return ids if self.rows is None else ids[torch.tensor(self.rows, device=ids.device)]

    def step(self, whole: Prefilled, ids_Br: Tensor, entering: Entering) -> Tensor:
        layers = whole.layers
        if self.ran.cache is None:
            return on_top(
                whole.anatomy, self.batch, ids_Br, layers=layers, entering=entering, **whole.inputs
            )
        return on_cache(
            whole.anatomy, self.batch, self.ran, ids_Br, layers=layers, entering=entering
        )


def _resumed(anatomy: Anatomy, ran: Ran) -> Ran:
    assert ran.first is not None
    seen: list[Any] = []
    thread = threading.get_ident()

    def note(_: nn.Module, __: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            seen.append(output)

    hook = anatomy.decoder.register_forward_hook(note)
    try:
        output = ran.first.resume()
    finally:
        hook.remove()
    name = cache_name(output)
    cache = None if name is None else getattr(output, name)
    hidden = last_hidden_state(seen[-1])
    return Ran(hidden, cache, name, output.logits[:, -1])
