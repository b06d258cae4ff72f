"""The options of `generate`: resolves settings, and selects those of some of the prompts.

Shapes: B prompts, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from pliant.errors import InvalidInput


def setting(model: nn.Module, options: dict[str, Any], name: str) -> Any:
    """The value that `generate` uses: of the options, their configuration or the model's own."""
    own = getattr(model, "generation_config", None)
    values = [
        options.get(name),
        *(getattr(c, name, None) for c in (options.get("generation_config"), own)),
    ]
    return next((value for value in values if value is not None), None)


def copies(model: nn.Module, options: dict[str, Any]) -> int:
    """How many sequences each prompt gets."""
    return int(setting(model, options, "num_return_sequences") or 1)


def needs_full_forward(model: nn.Module, options: dict[str, Any]) -> bool:
    """Whether generation runs without a cache, or with the first layers drafting for all."""
    no_cache = setting(model, options, "use_cache") is False
    return no_cache or setting(model, options, "assistant_early_exit") is not None


def check(options: dict[str, Any]) -> None:
    for name in ("input_ids", "inputs", "inputs_embeds"):
        if name in options:
            raise InvalidInput(f"{name}=: the prompts come first, as ids, texts or messages")


def align_options(
    options: dict[str, Any], ids_BT: Tensor, mask_BT: Tensor | None
) -> dict[str, Any]:
    """The options, with tensors of the prompts' shape (types, positions) aligned like them."""
    if mask_BT is None:
        return options
    order_BT = (mask_BT != 0).to(ids_BT).argsort(dim=1, stable=True)
    return {
        name: value.gather(1, order_BT.to(value.device))
        if isinstance(value, Tensor) and value.shape == ids_BT.shape
        else value
        for name, value in options.items()
    }


def select_prompts(
    model: nn.Module, options: dict[str, Any], rows: Sequence[int], lengths: Sequence[int]
) -> dict[str, Any]:
    """The options for the prompts `rows`. A tensor with an entry for each prompt is reduced to
    theirs, and a function of a prompt's index in the batch gets its index among all prompts."""
    count, width = len(lengths), max(lengths[row] for row in rows)
    selected = dict(options)
    for name, value in options.items():
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[0] == count:
            selected[name] = value[torch.as_tensor(rows, device=value.device)]
            if value.shape == (count, max(lengths)):
                selected[name] = selected[name][:, max(lengths) - width :]
    if (allowed := options.get("prefix_allowed_tokens_fn")) is not None:
        beams = int(setting(model, options, "num_beams") or 1)
        each = copies(model, options) if beams == 1 else 1

        def allowed_here(index: int, ids: Tensor) -> Any:
            row, copy = divmod(index, each)
            return allowed(rows[row] * each + copy, ids)

        selected["prefix_allowed_tokens_fn"] = allowed_here
    return selected


class BufferedStreamer(BaseStreamer):
    """Buffers streamed tokens until we know which prompts stay; the others stream nothing."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self.streamer = streamer
        self.buffer: list[Tensor] | None = []

    def put(self, value: Tensor) -> None:
        if self.buffer is None:
            self.streamer.put(value)
        else:
            self.buffer.append(value)

    def end(self) -> None:
        self.release()
        self.streamer.end()

    def release(self) -> None:
        """Stream the buffer, and from now on every token at once."""
        buffer, self.buffer = self.buffer or [], None
        for value in buffer:
            self.streamer.put(value)
