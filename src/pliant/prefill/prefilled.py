"""A batch of prompts that was run: its hidden states and cache, and what can run on top of them.

Shapes: B prompts, T positions, r new ones, D features, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.anatomy.cache_copy import copy_state
from pliant.anatomy.decoder import last_hidden_state
from pliant.anatomy.find import device_of
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.prefill.batch import Batch, align
from pliant.prefill.forward import (
    ForwardResult,
    StepContext,
    cache_in,
    groups,
    inputs_of,
    no_context,
    on_cache,
    on_top,
    run,
    run_layers,
    supports_cache,
)
from pliant.prefill.prefix import Prefix, batch_of, join, split


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
    early exit stores nothing for `resume`. `inputs` go to the model unchanged.
    """
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    batch = align(input_ids, attention_mask)
    use_cache = supports_cache(anatomy)
    parts = []
    with torch.set_grad_enabled(grad):
        for rows in groups(anatomy, batch):
            part = batch if rows is None else batch.select(rows)
            kwargs = {**inputs_of(anatomy, part), **inputs, "use_cache": use_cache}
            if layers is None:
                result = run(anatomy, kwargs, head=head)
            else:
                result = run_layers(anatomy, layers, kwargs, resumable=resumable)
            parts.append(Part(rows, part, result))
    return Prefilled(anatomy, layers, batch, tuple(parts), inputs)


@dataclass(frozen=True, eq=False)
class Prefilled:
    """A batch of prompts that a model, or its first layers, has run."""

    anatomy: Anatomy = field(repr=False)
    layers: int | None
    """The number of layers that ran; None for all."""
    batch: Batch
    parts: tuple[Part, ...] = field(repr=False)
    """One, unless prompts of different lengths had to run separately."""
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
        """(B, V), of the last token; None after an early exit, until `resume`."""
        return self._gather(lambda part: part.result.logits_BV)

    @property
    def hidden(self) -> Tensor | None:
        """(B, D), of the last token after the final norm, as if the model ended here."""
        return self._gather(lambda part: part.result.last_BD)

    @property
    def cache(self) -> Any:
        """A copy of the cache, to continue from; None if the model does not support its cache."""
        if len(self.parts) != 1:
            raise UnsupportedModel(
                f"{self._name} does not support padding on the left, so these prompts of several "
                "lengths have no cache in common: run one length at a time"
            )
        return copy_state(self.parts[0].result.cache)

    def step(self, ids: Tensor, step_context: StepContext = no_context) -> Tensor:
        """The hidden states (B, r, D), after the norm, of (B, r) ids on top of the prompts.

        The cache stays unchanged. Gradients flow to whatever hooks write at the new positions.
        `step_context(i, j, shape)` is entered around the forward of positions i to j - 1.
        """
        if ids.dim() != 2 or ids.shape[0] != len(self.input_ids) or ids.shape[1] == 0:
            raise InvalidInput(
                f"ids must be of shape ({len(self.input_ids)}, 1 or more), not {tuple(ids.shape)}"
            )
        hidden = self._gather(lambda part: part.step(self, part.rows_of(ids), step_context))
        assert hidden is not None
        return hidden

    def resume(self) -> Prefilled:
        """Run the remaining layers after an early exit: bit for bit the full prefill."""
        if self.layers is None:
            return self
        parts = tuple(Part(p.rows, p.batch, _resume(p.result)) for p in self.parts)
        return Prefilled(self.anatomy, None, self.batch, parts, self.inputs)

    def split(self) -> list[Prefix]:
        """Each prompt's keys and values, without padding; `join` makes a batch of them again."""
        prefixes: dict[int, Prefix] = {}
        for part in self.parts:
            rows = range(len(self.input_ids)) if part.rows is None else part.rows
            if part.result.cache is None:
                raise UnsupportedModel(f"{self._name} has no cache that can be split")
            split_cache = split(part.result.cache, part.batch, self._name)
            prefixes.update(zip(rows, split_cache, strict=True))
        return [prefixes[row] for row in sorted(prefixes)]

    @classmethod
    def join(
        cls, model: nn.Module | Anatomy, prefixes: Sequence[Prefix], *, layers: int | None = None
    ) -> Prefilled:
        """A batch of prompts from `split`, of any lengths, ready for `step`; its ids are zeros."""
        anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
        if not prefixes:
            raise InvalidInput("no prefixes to join: give at least one")
        batch, parts = batch_of(prefixes, device_of(anatomy.embeddings)), []
        for rows in groups(anatomy, batch):
            members = prefixes if rows is None else [prefixes[row] for row in rows]
            cache, part = join(anatomy, members)
            parts.append(Part(rows, part, ForwardResult(None, cache, "past_key_values")))
        return cls(anatomy, layers, batch, tuple(parts))

    def _gather(self, of: Callable[[Part], Tensor | None]) -> Tensor | None:
        """The parts' tensors as one, in the order of the prompts."""
        tensors = [tensor for part in self.parts if (tensor := of(part)) is not None]
        if self.parts[0].rows is None or not tensors:
            return tensors[0] if tensors else None
        rows = [row for part in self.parts for row in part.rows or ()]
        gathered = torch.cat(tensors)
        return gathered[torch.tensor(rows, device=gathered.device).argsort()]

    @property
    def _name(self) -> str:
        return type(self.anatomy.model).__name__


@dataclass(frozen=True, eq=False)
class Part:
    """Prompts that ran together."""

    rows: list[int] | None
    """Their rows of the batch; None for all, in order."""
    batch: Batch
    result: ForwardResult

    def rows_of(self, ids: Tensor) -> Tensor:
        ids = ids.to(self.batch.ids_BT.device)
        return ids if self.rows is None else ids[torch.tensor(self.rows, device=ids.device)]

    def step(self, prefilled: Prefilled, ids_Br: Tensor, step_context: StepContext) -> Tensor:
        anatomy = prefilled.anatomy
        options: Any = {"layers": prefilled.layers, "step_context": step_context}
        if self.result.cache is None:
            return on_top(anatomy, self.batch, ids_Br, **options, **prefilled.inputs)
        return on_cache(anatomy, self.batch, self.result, ids_Br, **options)


def _resume(result: ForwardResult) -> ForwardResult:
    assert result.first is not None
    decoded, output = result.first.resume_both()
    cache, name = cache_in(output)
    return ForwardResult(last_hidden_state(decoded), cache, name, output.logits[:, -1])
