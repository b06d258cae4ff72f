"""Questions about experts: can the singular values of its projections be scaled, and merged?

They import PEFT when they are asked: with bitsandbytes, which it imports, that takes a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pliant.survey.capability import Specimen, Verdict, register, yes_if
from pliant.survey.complexity import compare, generate

if TYPE_CHECKING:
    from peft import PeftModel

EQUAL, ROUNDINGS, MOST = 5e-5, 10, 5e-4
"""Sums of the same numbers in another order: how far they may be apart, relative to the largest
logit, and how many times the model's own rounding error, up to a limit. CPM-Ant's activations are
so large that its error is .00001 to .00003, and the ways .00004 to .00006 apart, by the CPU."""
SPREAD = 0.1
"""The standard deviation of z around 1 in these questions."""


@register("experts", "singular values", needs=["layers"])
def singular_values(specimen: Specimen) -> Verdict:
    """Can an expert act on it, and be merged into a stock model?

    Does an expert at z = 1 change no bit, act otherwise, and merge to the same logits?
    """
    with _expert(specimen) as (model, plain):
        if not torch.equal(specimen.run(), plain):
            return Verdict(False, "z = 1 changes the logits")
        scatter(model)
        delta = _as(specimen, model, "delta")
        if torch.equal(delta, plain):
            return Verdict(False, "z has no effect")
        ways = {"folded into the weights": _as(specimen, model, "folded")}
        model.merge_adapter()
        ways["merged"] = specimen.run()
        model.unmerge_adapter()
        with model.disable_adapter():
            restored = torch.equal(specimen.run(), plain)
    for way, logits in ways.items():
        if not _equal(specimen, logits, delta):
            return Verdict(False, f"{way}, the logits are others")
    return yes_if(restored, "unmerging leaves a trace in the model")


@register("experts", "z gradients", needs=["singular values"])
def z_gradients(specimen: Specimen) -> Verdict:
    """Can an expert be trained on it?

    Has z a gradient, the same in both forms, and nothing else?
    """
    with _expert(specimen) as (model, _):
        scatter(model)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if any("svf_z" not in name for name in trained):
            return Verdict(False, "something besides z is trained")
        both = [_gradients(specimen, model, form) for form in ("delta", "folded")]
    reached = sum(bool(gradient.any()) for gradient in both[0])
    if 2 * reached < len(trained):  # a layer that runs only when there is an image has none
        return Verdict(False, "no gradient reaches z")
    scale = max(float(gradient.abs().max()) for gradient in both[0])
    far = max(float((a - b).abs().max()) for a, b in zip(*both, strict=True))
    return yes_if(far <= 1e-3 * scale, "the folded form has another gradient")


@register("experts", "expert cache", needs=["cached", "singular values"])
def expert_cache(specimen: Specimen) -> Verdict:
    """With an expert, does its cache still work?

    With an expert, does generation with the cache equal generation without?
    """
    with _expert(specimen) as (model, _):
        scatter(model)
        model.requires_grad_(False)
        cached, without = (generate(specimen, specimen.ids, use_cache=c) for c in (True, False))
    return compare(cached, without, "with the cache", "without")


@register("experts", "expert rows", needs=["singular values"])
def expert_rows(specimen: Specimen) -> Verdict:
    """Can each prompt of a batch have an expert of its own?

    Can each row of a batch have its own expert, and equal that expert alone?
    """
    with _expert(specimen) as (model, plain):
        scatter(model)
        model.requires_grad_(False)
        alone = specimen.run()
        with model.base_model.rows([{}, {"default": 1.0}]):
            rows = specimen.run()
    same = _equal(specimen, rows, torch.stack([plain[0], alone[1]]))
    return yes_if(same, "a row's logits are others")


def _equal(specimen: Specimen, logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether they differ by no more than rounding explains."""
    apart = float((logits - expected).abs().max() / expected.abs().max())
    return apart <= EQUAL or apart <= min(ROUNDINGS * specimen.rounding, MOST)


@contextmanager
def _expert(specimen: Specimen) -> Iterator[tuple[PeftModel, torch.Tensor]]:
    """The specimen with an expert on all projections, and its logits without, weights frozen."""
    from peft import get_peft_model

    from pliant.experts import SVFConfig

    trainable = [p for p in specimen.model.parameters() if p.requires_grad]
    specimen.model.requires_grad_(False)  # a convolution rounds otherwise if its weight is not
    plain = specimen.run()
    model = get_peft_model(specimen.model, SVFConfig())
    try:
        yield model.eval(), plain
    finally:
        model.unload()
        for parameter in trainable:
            parameter.requires_grad_(True)


@torch.no_grad()
def scatter(model: torch.nn.Module, seed: int = 0) -> None:
    """Every z around 1."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in _layers(model):
        for change in layer.changes().values():
            change.copy_(SPREAD * torch.randn(change.shape, generator=generator))


def _as(specimen: Specimen, model: Any, form: str) -> torch.Tensor:
    for _, layer in _layers(model):
        layer.form = form
    return specimen.run()


def _gradients(specimen: Specimen, model: Any, form: str) -> list[torch.Tensor]:
    for _, layer in _layers(model):
        layer.form = form
    logits = specimen.model(input_ids=specimen.ids, use_cache=False).logits
    own = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(logits.float().logsumexp(-1).sum(), own, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(own, found, strict=True)]


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    from pliant.experts.model import svf_layers

    return svf_layers(model)
