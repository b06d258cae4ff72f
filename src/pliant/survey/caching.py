"""Questions about a model's cache: does it continue, can it be cropped, is left padding exact?"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pliant.survey.capability import YES, Verdict, register
from pliant.survey.specimen import Specimen

NEW_TOKENS = 3
PADDING = 3
CLOSE = 1e-4
"""Cached and uncached steps add numbers in different orders."""


@register("foundation", "cached", needs=["runs"])
def cached(specimen: Specimen) -> Verdict:
    """Does generation with the cache equal generation without?"""
    with_cache = _generate(specimen, specimen.ids, use_cache=True)
    without = _generate(specimen, specimen.ids, use_cache=False)
    return _compare(with_cache, without, "with the cache", "without")


@register("complexity", "crop", needs=["cached"])
def crop(specimen: Specimen) -> Verdict:
    """Can the last tokens be cropped from its cache without a trace?"""
    cache = _filled(specimen, record=False)
    if not hasattr(cache, "is_croppable"):
        return Verdict(False, "its forward returns no cache of transformers' kind")
    if _cropped(cache):
        return _continues(specimen, cache, note="")
    cache = _filled(specimen, record=True)
    if _cropped(cache):
        return _continues(specimen, cache, note="after activate_past_recording()")
    return Verdict(False, f"not croppable: {', '.join(_not_croppable(cache))}")


@register("complexity", "left padding", needs=["cached"])
def left_padding(specimen: Specimen) -> Verdict:
    """Does padding on the left leave the answers as they are?"""
    plain = _generate(specimen, specimen.ids[:1], use_cache=True)
    padding = torch.full((1, PADDING), pad_token(specimen))
    ids = torch.cat([padding, specimen.ids[:1]], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :PADDING] = 0
    padded = _generate(specimen, ids, use_cache=True, attention_mask=mask)
    return _compare(padded, plain, "padded", "plain")


def _generate(specimen: Specimen, ids: Tensor, **options: Any) -> Tensor:
    """The logits of a few greedy steps, (batch, step, vocabulary)."""
    options.setdefault("attention_mask", torch.ones_like(ids))
    result = specimen.model.generate(
        ids,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=pad_token(specimen),
        **options,
    )
    return torch.stack(result.logits, dim=1)


@torch.no_grad()
def _filled(specimen: Specimen, record: bool) -> Any:
    """A cache that holds the prompts; with `record`, it also records what it overwrites."""
    inputs: dict[str, Any] = {"use_cache": True}
    if record:
        from transformers import DynamicCache

        cache = DynamicCache(config=specimen.anatomy.config)
        cache.activate_past_recording()
        inputs["past_key_values"] = cache
    output = specimen.model(input_ids=specimen.ids, **inputs)
    return getattr(output, "past_key_values", None)


def _cropped(cache: Any) -> bool:
    """Crop the last two tokens, if the cache can and still holds what came before."""
    if not cache.is_croppable:
        return False
    try:
        cache.crop(-2)
    except RuntimeError:
        return False
    return True


@torch.no_grad()
def _continues(specimen: Specimen, cache: Any, note: str) -> Verdict:
    """Run the last two tokens again on the cropped cache: their logits must be the same."""
    again = specimen.model(input_ids=specimen.ids[:, -2:], past_key_values=cache, use_cache=True)
    close = torch.allclose(again.logits[:, -2:], specimen.logits[:, -2:], atol=CLOSE)
    return Verdict(close, note if close else "cropped, it continues to other logits")


def _not_croppable(cache: Any) -> list[str]:
    layers = [layer for layer in getattr(cache, "layers", []) if not layer.is_croppable]
    return sorted({type(layer).__name__ for layer in layers}) or [type(cache).__name__]


def pad_token(specimen: Specimen) -> int:
    pad = getattr(specimen.model.config, "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0


def _compare(ours: Tensor, theirs: Tensor, case: str, reference: str) -> Verdict:
    if ours.shape != theirs.shape:
        return Verdict(False, f"{tuple(ours.shape)} {case}, {tuple(theirs.shape)} {reference}")
    if torch.allclose(ours, theirs, atol=CLOSE):
        return YES
    # Different machines agree on the order of magnitude only.
    magnitude = 10.0 ** math.ceil(math.log10((ours - theirs).abs().max().item()))
    return Verdict(False, f"logits differ by up to {magnitude:g} {case}")
