"""How much a gradient each token is worth, computed from the logits that predict it.

N is tokens, V the vocabulary, D the width of the hidden states. Without
targets a score is what the model itself expects (so the loss is the entropy); beside others, a
target below 0 has no loss and no gradient: 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.errors import InvalidInput
from pliant.gradients.config import Score

AT_ONCE = {"cpu": 4_000_000, "cuda": 64_000_000}
"""Logits that exist at a time, and by which rows are counted: what stays near the cores of a CPU
(at a vocabulary of 32,768, 128 rows took .60 of the time of 256), or fills an accelerator."""
FIRST = 16


@torch.no_grad()
def difficulty(logits_NV: Tensor, targets_N: Tensor | None, score: Score) -> Tensor:
    """A score for each row, (N,) in fp32; higher is harder.

    entropy   H - p1, with p1 the probability of the likeliest token and H the entropy
    margin    1 - (p1 - p2), with p2 that of the second
    loss      -log p of the target
    combined  the sum of the three
    gradient  the length of the loss's gradient at the logits, sqrt(1 - 2 p_y + sum of p^2)
    doubt     loss * H / log V: to be wrong and sure of it counts little
    """
    return _FORMULAS[score](_log_softmax(logits_NV), targets_N)


@dataclass(frozen=True, eq=False)
class Scored:
    """What is known of some rows once they are scored."""

    scores_N: Tensor
    losses_N: Tensor
    """Of the targets; without targets, the entropies."""
    confidence: Tensor | None
    """The mean probability of the likeliest token, over rows with a target, on its device; None
    unless it was asked for."""


@torch.no_grad()
def in_chunks(
    logits_of: Callable[[Tensor], Tensor],
    hidden_ND: Tensor,
    targets_N: Tensor | None,
    score: Score,
    *,
    rows: int | None = None,
    confidence: bool = False,
) -> Scored:
    """The scores of hidden states, whose logits are computed `rows` at a time and not stored."""
    scores = hidden_ND.new_zeros(len(hidden_ND), dtype=torch.float32)
    losses, top = torch.zeros_like(scores), torch.zeros_like(scores)
    for part, logits_NV, targets in _parts(logits_of, hidden_ND, targets_N, rows):
        if score == "gradient" and targets is not None and not confidence:
            scores[part], losses[part] = _gradient_and_loss(logits_NV.float(), targets)
            continue
        logp_NV = _log_softmax(logits_NV)
        scores[part], losses[part] = _FORMULAS[score](logp_NV, targets), _loss(logp_NV, targets)
        if confidence:
            top[part] = logp_NV.amax(-1).exp()
    return Scored(scores, losses, mean_of_known(top, targets_N) if confidence else None)


@torch.no_grad()
def measured(
    logits_NV: Tensor, targets_N: Tensor | None, score: Score, *, rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits that exist anyway: scores, probabilities of the likeliest token, entropies."""
    measurements = logits_NV.new_empty(3, len(logits_NV), dtype=torch.float32)
    for part, some_NV, targets in _parts(lambda logits: logits, logits_NV, targets_N, rows):
        logp_NV = _log_softmax(some_NV)
        measurements[0, part] = _FORMULAS[score](logp_NV, targets)
        measurements[1, part] = logp_NV.amax(-1).exp()
        measurements[2, part] = _spread(logp_NV)
    return measurements[0], measurements[1], measurements[2]


def _parts(
    logits_of: Callable[[Tensor], Tensor],
    hidden_ND: Tensor,
    targets_N: Tensor | None,
    rows: int | None,
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Some rows at a time: which, their logits, their targets."""
    if rows is not None and rows < 1:
        raise InvalidInput(f"rows = {rows}: give 1 or more")
    at = 0
    while at < len(hidden_ND):
        part = slice(at, at + (rows or FIRST))
        targets = None if targets_N is None else targets_N[part]
        logits_NV = logits_of(hidden_ND[part])
        at += len(logits_NV)
        if rows is None:  # the width is known from the first rows
            rows = at_once(hidden_ND.device, logits_NV.shape[-1])
        yield part, logits_NV, targets


def at_once(device: torch.device, vocabulary: int) -> int:
    """How many rows' logits are made at a time."""
    return max(1, AT_ONCE.get(device.type, AT_ONCE["cuda"]) // vocabulary)


def mean_of_known(values_N: Tensor, targets_N: Tensor | None) -> Tensor:
    """The mean over the rows that have a target; 0 if none has."""
    known = torch.ones_like(values_N) if targets_N is None else (targets_N >= 0).to(values_N.dtype)
    return (values_N * known).sum() / known.sum().clamp(min=1)


def _log_softmax(logits_NV: Tensor) -> Tensor:
    if logits_NV.dim() != 2:
        raise InvalidInput(f"logits of shape {tuple(logits_NV.shape)}: (tokens, vocabulary) is due")
    return logits_NV.float().log_softmax(-1)


def _entropy(logp_NV: Tensor, targets_N: Tensor | None) -> Tensor:
    return _spread(logp_NV) - logp_NV.amax(-1).exp()


def _margin(logp_NV: Tensor, targets_N: Tensor | None) -> Tensor:
    p_N2 = logp_NV.topk(min(2, logp_NV.shape[-1]), dim=-1).values.exp()
    return 1 - (2 * p_N2[:, 0] - p_N2.sum(-1) if p_N2.shape[-1] > 1 else p_N2[:, 0])


def _loss(logp_NV: Tensor, targets_N: Tensor | None) -> Tensor:
    if targets_N is None:
        return _spread(logp_NV)
    losses = -logp_NV.gather(-1, targets_N.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return losses.masked_fill(targets_N < 0, 0.0)


def _combined(logp_NV: Tensor, targets_N: Tensor | None) -> Tensor:
    return _entropy(logp_NV, targets_N) + _margin(logp_NV, targets_N) + _loss(logp_NV, targets_N)


def _gradient_and_loss(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Both from one softmax, for they are asked of every token of every step."""
    p_NV = logits_NV.softmax(-1)
    y_N1, known = targets_N.clamp(min=0).unsqueeze(-1), targets_N >= 0
    losses = -p_NV.gather(-1, y_N1).squeeze(-1).clamp(min=torch.finfo(torch.float32).tiny).log()
    p_NV.scatter_add_(-1, y_N1, p_NV.new_full(y_N1.shape, -1.0))
    return p_NV.norm(dim=-1) * known, losses * known


def _gradient(logp_NV: Tensor, targets_N: Tensor | None) -> Tensor:
    """The gradient itself, p - 1[target], measured: near 0 the formula above loses its digits."""
    p_NV = logp_NV.exp()
    if targets_N is None:
        return (1 - p_NV.square().sum(-1)).clamp(min=0).sqrt()
    y_N1 = targets_N.clamp(min=0).unsqueeze(-1)
    p_NV.scatter_add_(-1, y_N1, p_NV.new_full(y_N1.shape, -1.0))
    return p_NV.norm(dim=-1).masked_fill(targets_N < 0, 0.0)


def _doubt(logp_NV: Tensor, targets_N: Tensor | None) -> Tensor:
    most = math.log(max(2, logp_NV.shape[-1]))
    return _loss(logp_NV, targets_N) * _spread(logp_NV) / most


_FORMULAS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "entropy": _entropy,
    "margin": _margin,
    "loss": _loss,
    "combined": _combined,
    "gradient": _gradient,
    "doubt": _doubt,
}


def _spread(logp_NV: Tensor) -> Tensor:
    """The entropy; a token of probability 0 adds nothing to it (and not 0 * inf)."""
    return torch.special.entr(logp_NV.exp()).sum(-1)
