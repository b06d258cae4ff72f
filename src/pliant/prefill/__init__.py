"""Prefill: run a batch of prompts once, add positions on top, stop early, resume, split and join.

    prefilled = prefill(model, input_ids, attention_mask)
    prefilled.logits             # of each prompt's last token
    prefilled.step(ids)          # runs more positions on top, and leaves the cache unchanged
    Prefilled.join(model, prefilled.split())   # the same from prefixes that were stored one by one

`batch` aligns prompts to the left; `forward` runs all layers or the first ones, and tries out
whether a model supports its cache and padding; `prefilled` is the result, what can be done with it,
and the keys and values of one prompt.
"""

from pliant.anatomy.find import device_of
from pliant.prefill.batch import Batch, align, alike
from pliant.prefill.forward import ForwardResult, groups, on_top, supports_cache, supports_padding
from pliant.prefill.prefilled import Prefilled, Prefix, prefill

__all__ = [
    "Batch",
    "ForwardResult",
    "Prefilled",
    "Prefix",
    "align",
    "alike",
    "device_of",
    "groups",
    "on_top",
    "prefill",
    "supports_cache",
    "supports_padding",
]
