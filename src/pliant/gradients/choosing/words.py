"""Scores told from some of the vocabulary, for a head that is read whole costs what training saves.

A score only says how likely a token is to be drawn, and the draw's weights make up for that: so a
score may be an estimate, and the gradient stays unbiased. Read are the words of the batch itself,
the most frequent first, and as many others drawn at random, each of which stands for all those that
were not; and of each row its own target, so that a row's loss is off by no more than what the
others add up to.

N is tokens, C the words that are read, V the vocabulary, D the width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.errors import PliantError
from pliant.gradients.choosing.scores import Scored, at_once
from pliant.gradients.config import GradientConfig, Score

FEWEST = 1024
"""Words that are read at least: below, a head costs too little to be spared."""
TRIED, TOLERANCE = 16, 1e-2
"""Rows on which it is tried whether the model's way to logits takes some words alone; and how far
two ways to one logit may be apart (in bf16), as a share of the largest."""


@dataclass(frozen=True, eq=False)
class Words:
    """The words that are read for one batch."""

    ids_C: Tensor
    stands_for_C: Tensor
    """How many words each stands for, itself among them."""
    place_V: Tensor
    """Where a word is among them; -1 where it is not."""


def how_many(head: nn.Module | None, config: GradientConfig) -> int | None:
    """How many words to read; None where it is the whole vocabulary: for rules that weigh nothing,
    so that a score's error would be theirs, and for heads that are no plain matrix."""
    fit = config.selection == "sampled" and config.score in ("gradient", "loss")
    if not fit or config.dynamic or type(head) is not nn.Linear:
        return None
    if hasattr(head.weight, "full_tensor"):  # in shards, a word's row may be elsewhere
        return None
    some = max(FEWEST, round(config.score_share * head.out_features))
    return some if some < head.out_features else None


def drawn(targets_N: Tensor, vocabulary: int, some: int, generator: torch.Generator) -> Words:
    """Half of them are the batch's own; they stand for themselves. Nothing waits for the device."""
    device, own = targets_N.device, some // 2
    chance_2V = torch.rand(2, vocabulary, generator=generator).to(device)
    counts_V = torch.zeros(vocabulary, device=device)
    counts_V.index_add_(0, targets_N, torch.ones(len(targets_N), device=device))
    own_ids = (counts_V + chance_2V[0]).topk(own).indices
    others = chance_2V[1].index_fill(0, own_ids, -1.0).topk(some - own).indices
    ids_C = torch.cat((own_ids, others))
    stands_for_C = torch.ones(some, device=device)
    stands_for_C[own:] = (vocabulary - own) / (some - own)
    place_V = torch.full((vocabulary,), -1, device=device)
    place_V[ids_C] = torch.arange(some, device=device)
    return Words(ids_C, stands_for_C, place_V)


class LogitsBy(Protocol):
    """From hidden states to logits the model's own way, but for what answers for its head."""

    def __call__(self, rows: Tensor, instead: PartialHead | None = None) -> Tensor: ...


@torch.no_grad()
def estimated(
    logits_by: LogitsBy,
    head: nn.Linear,
    words: Words,
    hidden_ND: Tensor,
    targets_N: Tensor,
    score: Score,
) -> Scored:
    """About what the whole vocabulary would tell."""
    weight_CD, bias_C = _read(head, words.ids_C)
    grow_C, shrink_C = words.stands_for_C.log(), words.stands_for_C.rsqrt()
    lengths = hidden_ND.new_zeros(len(hidden_ND), dtype=torch.float32)
    losses = torch.zeros_like(lengths)
    rows = at_once(hidden_ND.device, len(words.ids_C))
    for at in range(0, len(hidden_ND), rows):
        part = slice(at, at + rows)
        instead = PartialHead(head, weight_CD, bias_C, targets_N[part])
        logits_NC = logits_by(hidden_ND[part], instead).float()
        logits_NC[:, :-1] += grow_C
        _count_once(logits_NC, words.place_V[targets_N[part]].unsqueeze(-1))
        p_NC = logits_NC.softmax(-1)
        losses[part] = -p_NC[:, -1].clamp(min=torch.finfo(torch.float32).tiny).log()
        # The gradient at the logits is p - 1[target]; n words of p / n each are p / sqrt(n) long.
        p_NC[:, :-1] *= shrink_C
        p_NC[:, -1] -= 1
        lengths[part] = p_NC.norm(dim=-1)
    return Scored(losses if score == "loss" else lengths, losses, None)


@torch.no_grad()
def agree(
    logits_by: LogitsBy, head: nn.Linear, words: Words, hidden_ND: Tensor, targets_N: Tensor
) -> bool:
    """Whether some words get the logits on the model's own way that they have among all, on these
    rows: a model that changes single words' logits, or mixes them, has another way."""
    try:
        instead = PartialHead(head, *_read(head, words.ids_C), targets_N)
        some_NC = logits_by(hidden_ND, instead).float()
    except (PliantError, RuntimeError, IndexError, ValueError, TypeError, AssertionError):
        return False
    all_NV = logits_by(hidden_ND).float()
    width = (len(words.ids_C) + 1, head.out_features)
    if (some_NC.shape[-1], all_NV.shape[-1]) != width:
        return False
    told_NC = torch.cat((all_NV[:, words.ids_C], all_NV.gather(-1, targets_N[:, None])), -1)
    most = told_NC.abs().max().clamp(min=1)
    if not bool(most.isfinite()):  # words that must not be said: beside them all would seem close
        return False
    return bool(((some_NC - told_NC).abs() <= TOLERANCE * most).all())


class PartialHead:
    """Answers for the head: the logits of some words, and last that of each row's own target."""

    def __init__(
        self, head: nn.Linear, weight_CD: Tensor, bias_C: Tensor | None, targets_N: Tensor
    ) -> None:
        self.weight_CD, self.bias_C = weight_CD, bias_C
        self.share = len(weight_CD) / head.out_features
        self.own_ND = head.weight[targets_N]
        self.own_N = None if head.bias is None else head.bias[targets_N]

    def __call__(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
        rows = args[0] if args else kwargs["input"]
        own = (rows.reshape(self.own_ND.shape) * self.own_ND).sum(-1)
        if self.own_N is not None:
            own = own + self.own_N
        logits = F.linear(rows, self.weight_CD, self.bias_C)
        logits[..., -1] = own.reshape(logits.shape[:-1])
        return logits


def _read(head: nn.Linear, ids_C: Tensor) -> tuple[Tensor, Tensor | None]:
    """Those rows of the matrix, and an empty one for the target's logit."""
    weight_CD = F.pad(head.weight[ids_C], (0, 0, 0, 1))
    return weight_CD, None if head.bias is None else F.pad(head.bias[ids_C], (0, 1))


def _count_once(logits_NC: Tensor, place_N1: Tensor) -> None:
    """A target that is among the words has its logit twice: leave it the last column alone."""
    at_N1 = place_N1.clamp(min=0)
    there_N1 = logits_NC.gather(-1, at_N1)
    logits_NC.scatter_(-1, at_N1, there_N1.masked_fill(place_N1 >= 0, -torch.inf))
