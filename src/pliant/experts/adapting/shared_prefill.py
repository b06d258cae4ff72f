"""Labels read on the answer's own prefill: the layers before the first expert run once for both.

    shared = SharedPrefill.of(anatomy, batch, layers)     # the question, through the base's layers
    with without_experts(anatomy):
        logits = shared.logits(suffix)                    # of a question about the question
    with use_rows(anatomy, chosen):
        cache = shared.cache()                            # for generate, with the chosen experts

The question comes first and what is asked about it follows, so the latter runs as one step on the
question's cache, which is left as it was. The later layers run twice, without and with the experts.

Shapes: B questions, r new tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache

from pliant.anatomy import Anatomy
from pliant.anatomy.decoder import last_hidden_state, run_decoder, run_head, with_hidden
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.prefill import Batch, Prefilled, prefill, supports_cache
from pliant.prefill.forward import extend, inputs_of, only_attends

TAKES_A_CACHE = {
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "eos_token_id",
    "pad_token_id",
}
"""Settings of `generate` with which it continues from a cache, one row for each prompt."""


def can_continue(model: Any, generation: Mapping[str, Any]) -> bool:
    """Whether `generate` can continue from a cache with these settings; not with beams."""
    own = getattr(model, "generation_config", None)
    rows = [getattr(own, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
    return TAKES_A_CACHE.issuperset(generation) and max(rows) == 1


@dataclass(frozen=True, eq=False)
class SharedPrefill:
    """A batch of questions, all but their last tokens, that ran through the first layers."""

    anatomy: Anatomy
    batch: Batch
    """The whole questions."""
    first: Prefilled

    @classmethod
    @torch.no_grad()
    def of(cls, anatomy: Anatomy, batch: Batch, layers: int) -> Self | None:
        """Run the first layers; None if the model cannot be stopped there, or has no exact cache of
        keys and values."""
        if min(batch.lengths) < 2 or not supports_cache(anatomy):
            return None
        try:
            first = prefill(anatomy, batch.ids_BT[:, :-1], batch.mask_BT[:, :-1], layers=layers)
        except (InvalidInput, UnsupportedModel):  # its layers do not run each once and in order
            return None
        if len(first.parts) > 1 or type(first.cache) is not DynamicCache:
            return None
        return cls(anatomy, batch, first) if only_attends(first.cache) else None

    @torch.no_grad()
    def cache(self) -> DynamicCache:
        """A cache of the questions but their last tokens, with the experts that are on now in the
        later layers."""
        cache: DynamicCache = self.first.resume(head=False).cache
        return cache

    @torch.no_grad()
    def logits(self, new: Sequence[Sequence[int]], keep: int) -> Tensor:
        """(B * len(new), keep, V): of the last positions of each continuation of each question.

        The continuations are of one length; those of the first question come first.
        """
        cache, copies = self.cache(), len(new)
        cache.batch_repeat_interleave(copies)
        ids_Br = torch.tensor(new, device=self.batch.ids_BT.device).repeat(
            len(self.batch.ids_BT), 1
        )
        questions = Batch(
            self.batch.ids_BT.repeat_interleave(copies, 0),
            self.batch.mask_BT.repeat_interleave(copies, 0),
        )
        longer = extend(questions, ids_Br)
        inputs = inputs_of(self.anatomy, longer, ids_Br.shape[1] + 1)  # and their last tokens
        inputs |= {"past_key_values": cache, "use_cache": True}
        decoded = run_decoder(self.anatomy, inputs)
        hidden = with_hidden(decoded, last_hidden_state(decoded)[:, -keep:])
        short = {**inputs, "input_ids": longer.ids_BT[:, -keep:]}
        logits: Tensor = run_head(self.anatomy, hidden, short).logits[:, -keep:]
        return logits.float()
