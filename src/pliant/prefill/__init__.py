"""Prefill: run a batch of prompts once, add positions on top, stop early, resume, split and join.

    prefilled = prefill(model, input_ids, attention_mask)
    prefilled.logits             # of each prompt's last token
    prefilled.step(ids)          # runs more positions on top, and leaves the cache unchanged
    Prefilled.join(model, prefilled.split())   # the same from prefixes that were stored one by one

`batch` aligns prompts to the left, `forward` runs all layers or the first ones, `prefilled` is the
result and what can be done with it, `prefix` holds the keys and values of one prompt, and `trials`
tries out whether a model supports its cache and padding.
"""

from pliant.anatomy.find import device_of
from pliant.prefill.batch import Batch, align
from pliant.prefill.forward import ForwardResult, on_top
from pliant.prefill.prefilled import Prefilled, prefill
from pliant.prefill.prefix import Prefix
from pliant.prefill.trials import groups, supports_cache, supports_padding

__all__ = [
    "Batch",
    "ForwardResult",
    "Prefilled",
    "Prefix",
    "align",
    "device_of",
    "groups",
    "on_top",
    "prefill",
    "supports_cache",
    "supports_padding",
]
