"""A batch of prompts, run once: keep its keys and values, add rows on top, stop early, resume.

    ran = prefill(model, input_ids, attention_mask)
    ran.logits                   # of each prompt's last token
    ran.step(ids)                # some more positions on top, and the cache is as it was before
    Prefilled.join(model, ran.split())   # the same from prefixes that were stored one by one

`batch` aligns the prompts to the left, `run` is one forward over whole or first layers, `prefilled`
what comes of it, `prefix` the keys and values of one prompt, `trials` what has to be asked of a
model before it is trusted with a cache or with padding.
"""

from pliant.anatomy.find import device_of
from pliant.prefill.batch import Batch, align
from pliant.prefill.prefilled import Prefilled, prefill
from pliant.prefill.prefix import Prefix
from pliant.prefill.run import Ran, on_top
from pliant.prefill.trials import bears_padding, groups, keeps_cache

__all__ = [
    "Batch",
    "Prefilled",
    "Prefix",
    "Ran",
    "align",
    "bears_padding",
    "device_of",
    "groups",
    "keeps_cache",
    "on_top",
    "prefill",
]
