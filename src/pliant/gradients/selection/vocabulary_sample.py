"""Scores estimated from a sample of the vocabulary: the full head would cost what training saves.

A score only decides how likely a token is to be drawn, and the draw's weights compensate for that:
so a score may be an estimate, and the gradient stays unbiased. The sample holds the tokens of the
batch itself, the most frequent first, and as many others drawn at random, each of which represents
all those that were not drawn; each row's own target is always computed.

N is tokens, C the sample, V the vocabulary, D the width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.errors import PliantError
from pliant.gradients.config import GradientConfig, Score
from pliant.gradients.selection.scores import Scored, at_once

MINIMUM = 1024
"""The smallest sample: a smaller head costs too little for an estimate to be worth it."""
TRIAL_ROWS, TOLERANCE = 16, 1e-2
"""The rows on which the sample's logits are compared with the full head's, and how far they may
differ (in bf16), relative to the largest."""


class LogitsBy(Protocol):
    """From hidden states to logits on the model's own path, with `instead` in place of its head."""

    def __call__(self, rows: Tensor, instead: PartialHead | None = None) -> Tensor: ...


def sample_size(head: nn.Module | None, config: GradientConfig) -> int | None:
    """None where the full vocabulary is read: for selections without weights, which an estimate
    would bias, and for heads that are not a plain matrix."""
    fits = config.selection == "sampled" and config.score in ("gradient", "loss")
    if not fits or config.dynamic or type(head) is not nn.Linear:
        return None
    if hasattr(head.weight, "full_tensor"):  # sharded: a row may be on another device
        return None
    size = max(MINIMUM, round(config.score_share * head.out_features))
    return size if size < head.out_features else None


@dataclass(frozen=True, eq=False)
class VocabularySample:
    """The vocabulary sample of one batch."""

    head: nn.Linear
    ids_C: Tensor
    represents_C: Tensor
    """How many entries each represents, itself included."""
    index_V: Tensor
    """The index of an entry in the sample; -1 where it is not in it."""

    @classmethod
    def draw(cls, head: nn.Linear, targets_N: Tensor, size: int, by: torch.Generator) -> Self:
        """Half of it are the batch's own tokens, which represent themselves. Nothing waits."""
        device, own, vocabulary = targets_N.device, size // 2, head.out_features
        chance_2V = torch.rand(2, vocabulary, generator=by).to(device)
        counts_V = torch.zeros(vocabulary, device=device)
        counts_V.index_add_(0, targets_N, torch.ones(len(targets_N), device=device))
        own_ids = (counts_V + chance_2V[0]).topk(own).indices
        others = chance_2V[1].index_fill(0, own_ids, -1.0).topk(size - own).indices
        ids_C = torch.cat((own_ids, others))
        represents_C = torch.ones(size, device=device)
        represents_C[own:] = (vocabulary - own) / (size - own)
        index_V = torch.full((vocabulary,), -1, device=device)
        index_V[ids_C] = torch.arange(size, device=device)
        return cls(head, ids_C, represents_C, index_V)

    @torch.no_grad()
    def scores(
        self, logits_by: LogitsBy, hidden_ND: Tensor, targets_N: Tensor, score: Score
    ) -> Scored:
        """An estimate of the scores over the full vocabulary."""
        weight_CD, bias_C = self._rows()
        grow_C, shrink_C = self.represents_C.log(), self.represents_C.rsqrt()
        lengths = hidden_ND.new_zeros(len(hidden_ND), dtype=torch.float32)
        losses = torch.zeros_like(lengths)
        rows = at_once(hidden_ND.device, len(self.ids_C))
        for at in range(0, len(hidden_ND), rows):
            part = slice(at, at + rows)
            instead = PartialHead(self.head, weight_CD, bias_C, targets_N[part])
            logits_NC = logits_by(hidden_ND[part], instead).float()
            logits_NC[:, :-1] += grow_C
            _count_once(logits_NC, self.index_V[targets_N[part]].unsqueeze(-1))
            p_NC = logits_NC.softmax(-1)
            losses[part] = -p_NC[:, -1].clamp(min=torch.finfo(torch.float32).tiny).log()
            # The gradient at the logits is p - 1[target]; n entries of p / n have length
            # p / sqrt(n).
            p_NC[:, :-1] *= shrink_C
            p_NC[:, -1] -= 1
            lengths[part] = p_NC.norm(dim=-1)
        return Scored(losses if score == "loss" else lengths, losses, None)

    @torch.no_grad()
    def agrees(self, logits_by: LogitsBy, hidden_ND: Tensor, targets_N: Tensor) -> bool:
        """Whether the sample's logits are those of the full vocabulary on these rows: a model that
        changes single logits, or mixes them, takes another path."""
        try:
            instead = PartialHead(self.head, *self._rows(), targets_N)
            sample_NC = logits_by(hidden_ND, instead).float()
        except (PliantError, RuntimeError, IndexError, ValueError, TypeError, AssertionError):
            return False
        all_NV = logits_by(hidden_ND).float()
        width = (len(self.ids_C) + 1, self.head.out_features)
        if (sample_NC.shape[-1], all_NV.shape[-1]) != width:
            return False
        own_N1 = all_NV.gather(-1, targets_N[:, None])
        expected_NC = torch.cat((all_NV[:, self.ids_C], own_N1), -1)
        most = expected_NC.abs().max().clamp(min=1)
        if not bool(most.isfinite()):  # masked logits: beside these, all others would seem close
            return False
        return bool(((sample_NC - expected_NC).abs() <= TOLERANCE * most).all())

    def _rows(self) -> tuple[Tensor, Tensor | None]:
        """The sample's rows of the matrix, and an empty one for the target's logit."""
        weight, bias = self.head.weight, self.head.bias
        weight_CD = F.pad(weight[self.ids_C], (0, 0, 0, 1))
        return weight_CD, None if bias is None else F.pad(bias[self.ids_C], (0, 1))


class PartialHead:
    """Answers for the head: the logits of the sample, and last that of each row's own target."""

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


def _count_once(logits_NC: Tensor, index_N1: Tensor) -> None:
    """A target that is in the sample has its logit twice: only the last column keeps it."""
    at_N1 = index_N1.clamp(min=0)
    logits_N1 = logits_NC.gather(-1, at_N1)
    logits_NC.scatter_(-1, at_N1, logits_N1.masked_fill(index_N1 >= 0, -torch.inf))
