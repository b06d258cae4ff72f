"""One forward and one backward pass: how each head attends, and whether it helps the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pliant.anatomy.modes import attention_among, eval_mode
from pliant.errors import InvalidInput
from pliant.structure.entropy import mask_of, recorded_entropy
from pliant.structure.gates import Gates
from pliant.structure.units import Site


def measure(
    gates: Gates, sites: Sequence[Site], batch: Mapping[str, Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """For the heads of each site, by its key: 1 - H(attention) / log T on this batch, and the
    derivative of the loss with respect to their gates. Nothing in the model changes."""
    model, labels_BT, mask_BT = gates.base, labels_of(batch), mask_of(batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    parameters = [gates.pattern()["heads", site.key] for site in sites]
    with (
        eval_mode(model),
        attention_among(model, "eager"),
        recorded_entropy(gates.anatomy, sites, mask_BT) as entropies,
        _requiring_grad(parameters),
        torch.enable_grad(),
    ):
        logits = model(**inputs, use_cache=False).logits
        loss = next_token_loss(logits, labels_BT)
        if not loss.isfinite():
            raise InvalidInput(f"the loss of this batch is {loss.item()}: nothing was observed")
        derivatives = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        site.key: (1 - entropies[site.key], torch.zeros_like(gate) if d is None else d)
        for site, gate, d in zip(sites, parameters, derivatives, strict=True)
    }


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """(rows, tokens): the batch's labels, or its own tokens, with -100 for padding."""
    mask_BT = mask_of(batch)
    labels = batch.get("labels")
    labels_BT = (batch["input_ids"] if labels is None else labels).masked_fill(~mask_BT, -100)
    if not (labels_BT[:, 1:] != -100).any():
        raise InvalidInput("the batch has no label that the position before it predicts")
    return labels_BT


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """The mean over labels. (A model's own loss may be shifted otherwise, or have more terms.)"""
    logits_NV = logits_BTV[:, :-1].flatten(0, 1).float()
    return cross_entropy(logits_NV, labels_BT[:, 1:].flatten().to(logits_NV.device))


@contextmanager
def _requiring_grad(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
