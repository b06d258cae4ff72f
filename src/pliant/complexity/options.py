"""What `generate` is told besides the prompts: as it finds settings, and for some prompts alone.

Shapes: B prompts, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from pliant.complexity.model import Complexity


def setting(scorer: Complexity, options: dict[str, Any], name: str) -> Any:
    """As `generate` finds it: among the options, in a given configuration, in the model's own."""
    own = getattr(scorer.anatomy.model, "generation_config", None)
    values = [options.get(name), *(getattr(c, name, None) for c in (_given(options), own))]
    return next((value for value in values if value is not None), None)


def copies(scorer: Complexity, options: dict[str, Any]) -> int:
    """How many sequences each prompt gets."""
    return int(setting(scorer, options, "num_return_sequences") or 1)


def is_run_otherwise(scorer: Complexity, options: dict[str, Any]) -> bool:
    """Without a cache; or first by some of the layers, who draft for the whole model."""
    no_cache = setting(scorer, options, "use_cache") is False
    return no_cache or setting(scorer, options, "assistant_early_exit") is not None


def check(options: dict[str, Any]) -> None:
    for name in ("input_ids", "inputs", "inputs_embeds"):
        if name in options:
            raise InvalidInput(f"{name}=: the prompts come first, as ids, texts or messages")


def aligned(options: dict[str, Any], ids_BT: Tensor, mask_BT: Tensor | None) -> dict[str, Any]:
    """The options, those of the prompts' own shape (types, positions) moved as the padding is."""
    if mask_BT is None:
        return options
    order_BT = (mask_BT != 0).to(ids_BT).argsort(dim=1, stable=True)
    return {
        name: value.gather(1, order_BT.to(value.device)) if _is_like(value, ids_BT) else value
        for name, value in options.items()
    }


def of_prompts(
    scorer: Complexity, options: dict[str, Any], rows: Sequence[int], lengths: Sequence[int]
) -> dict[str, Any]:
    """The options for some of the prompts, which have these lengths: of a tensor with one entry for
    each, theirs alone, as wide as they are; and who is told a prompt's place in the batch is told
    the place that the caller knows."""
    count, width = len(lengths), max(lengths[row] for row in rows)
    given = dict(options)
    for name, value in options.items():
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[0] == count:
            given[name] = value[torch.as_tensor(rows, device=value.device)]
            if value.shape == (count, max(lengths)):
                given[name] = given[name][:, max(lengths) - width :]
    if (allowed := options.get("prefix_allowed_tokens_fn")) is not None:
        beams = int(setting(scorer, options, "num_beams") or 1)
        given["prefix_allowed_tokens_fn"] = _Placed(
            allowed, rows, copies(scorer, options) if beams == 1 else 1
        )
    return given


class _Placed:
    """`allowed(place, ids)`, asked about the prompts that are left by their old places."""

    def __init__(self, allowed: Callable[..., Any], rows: Sequence[int], each: int) -> None:
        self.allowed = allowed
        self.rows = rows
        self.each = each

    def __call__(self, place: int, ids: Tensor) -> Any:
        row, copy = divmod(place, self.each)
        return self.allowed(self.rows[row] * self.each + copy, ids)


class Held(BaseStreamer):
    """Keeps what is streamed until it is known who stays: of who leaves, nothing is told."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self.streamer = streamer
        self.kept: list[Tensor] | None = []

    def put(self, value: Tensor) -> None:
        if self.kept is None:
            self.streamer.put(value)
        else:
            self.kept.append(value)

    def end(self) -> None:
        self.release()
        self.streamer.end()

    def release(self) -> None:
        """Pass on what was kept, and from now on everything at once."""
        kept, self.kept = self.kept or [], None
        for value in kept:
            self.streamer.put(value)


def _given(options: dict[str, Any]) -> Any:
    return options.get("generation_config")


def _is_like(value: Any, ids_BT: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == ids_BT.shape
