"""Questions about gradients: a loss on selected rows, and backward through those alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.anatomy.decoder import last_hidden_state
from pliant.gradients.engines.split_forward import SplitForward, rows_of
from pliant.gradients.engines.two_passes import completion, first_pass, second_pass
from pliant.survey.capability import Fp64Throughout, Specimen, Verdict, register, yes_if

LENGTH, PADS = 20, 6
"""Longer than a tiny model's sliding window."""
EXACT, SAME_GRADIENT = 1e-12, 1e-6
"""Relative, in fp64."""


@register("gradients", "chosen rows", needs=["runs"])
def chosen_rows(specimen: Specimen) -> Verdict:
    """Can the output layer run on selected tokens alone?

    With the head on labelled rows alone, are loss and gradient unchanged?
    """
    with _split(specimen) as split:
        ids = _ids()
        labels = ids.clone()
        labels[1, LENGTH // 2 :] = -100
        plain = {"input_ids": ids, "use_cache": False}
        logits = split.forward(**plain).logits[:, :-1].flatten(0, 1)
        targets_BT = F.pad(labels[:, 1:], (0, 1), value=-100)
        theirs = F.cross_entropy(logits.double(), targets_BT[:, :-1].flatten(), ignore_index=-100)
        decoded = split.backbone(plain)
        rows = last_hidden_state(decoded)[targets_BT != -100]
        logits = split.head(decoded, rows, plain).logits.reshape(len(rows), -1)
        ours = F.cross_entropy(logits.double(), targets_BT[targets_BT != -100])
        if abs(float(ours - theirs)) > EXACT * abs(float(theirs)):
            return Verdict(False, "the loss on rows differs")
        off = _difference(_gradient(split, ours), _gradient(split, theirs))
        return yes_if(off <= SAME_GRADIENT, f"the gradient on rows is off by {off:.0e}")


@register("gradients", "sparse", needs=["chosen rows"])
def sparse(specimen: Specimen) -> Verdict:
    """Can training run backward through selected tokens alone?

    Are chosen positions exact in fp64 with any padding, and all together the dense gradient?
    """
    with _split(specimen) as split:
        for padding in (None, "right", "left"):
            off = _off_at_chosen(split, padding)
            if not off <= EXACT:
                where = f" when padded on the {padding}" if padding else ""
                return Verdict(False, f"chosen positions are off by {off:.0e}{where}")
        off = _off_in_gradient(split)
        return yes_if(off <= SAME_GRADIENT, f"the gradient of all positions is off by {off:.0e}")


@register("gradients", "completion", needs=["sparse"])
@torch.no_grad()
def completions(specimen: Specimen) -> Verdict:
    """Can it train on completions without a gradient for their prompts?

    With the prompt run once without gradient, are the completion's positions exact in fp64?
    """
    with _split(specimen) as split:
        inputs, mask = _batch("right")
        valid = mask.bool()
        valid[0, :9], valid[1, :5], valid[:, -1] = False, False, False
        ours = last_hidden_state(completion(split, inputs, valid))
        whole = last_hidden_state(split.backbone(inputs))[:, : ours.shape[1]]
        off = _difference(ours[valid[:, : ours.shape[1]]], whole[valid[:, : ours.shape[1]]])
        return yes_if(off <= EXACT, f"the completion is off by {off:.0e}")


@torch.no_grad()
def _off_at_chosen(split: SplitForward, padding: str | None) -> float:
    inputs, mask = _batch(padding)
    at_BK = torch.stack([row.nonzero()[:, 0][[1, 2, 5, 8, 12]] for row in mask])
    live_BK = torch.ones_like(at_BK, dtype=torch.bool)
    whole = rows_of(last_hidden_state(split.backbone(inputs)), at_BK, live_BK)
    first = first_pass(split, inputs)
    ours = last_hidden_state(second_pass(split, inputs, first.pairs, at_BK, live_BK))
    return _difference(rows_of(ours, at_BK, live_BK), whole)


def _off_in_gradient(split: SplitForward) -> float:
    inputs, _ = _batch(None)
    at_BK = torch.arange(LENGTH).expand(2, -1)
    live_BK = torch.ones_like(at_BK, dtype=torch.bool)
    whole = last_hidden_state(split.backbone(inputs))
    weights = torch.linspace(-1, 1, whole.numel(), dtype=whole.dtype).view_as(whole)
    first = first_pass(split, inputs)
    ours = last_hidden_state(second_pass(split, inputs, first.pairs, at_BK, live_BK))
    dense = _gradient(split, (whole * weights).sum())
    return _difference(_gradient(split, (ours * weights).sum()), dense)


def _gradient(split: SplitForward, loss: Tensor) -> Tensor:
    trained = [p for p in split.anatomy.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return torch.cat([g.flatten() for g in gradients if g is not None])


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or not ours.isfinite().all():
        return float("inf")
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def _ids() -> Tensor:
    """Ordinary tokens; the special ones are at both ends of a tiny vocabulary."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(5, 100, (2, LENGTH), generator=generator)


def _batch(padding: str | None) -> tuple[dict[str, Any], Tensor]:
    ids = _ids()
    mask = torch.ones_like(ids)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if padding:
        mask[1, slice(LENGTH - PADS, None) if padding == "right" else slice(PADS)] = 0
        inputs["attention_mask"] = mask
    return inputs, mask


@contextmanager
def _split(specimen: Specimen) -> Iterator[SplitForward]:
    """The model in fp64 and in eval mode."""
    double = specimen.in_fp64
    with Fp64Throughout():
        yield SplitForward(double.anatomy, double.model.forward)
