"""Which tokens are trained: from the scores of a batch to positions and their weights.

    chosen = choose(difficulty_BT, valid_BT, config, ratio=0.25, generator=generator)

The loss of every rule is the sum of weight * loss over the chosen positions, divided by the number
of labelled tokens. B is rows, T positions, K the chosen of the row that has the most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.errors import InvalidInput
from pliant.gradients.config import GradientConfig
from pliant.gradients.selection.sampling import inclusion, mixed, starts, systematic, wide


@dataclass(frozen=True, eq=False)
class Chosen:
    """The positions to train, row by row."""

    positions_BK: Tensor
    """Ascending; slots beyond a row's own number repeat its last one (0 in a row without any)."""
    weights_BK: Tensor
    """What each counts in the loss, in fp32; 0 in the slots beyond."""
    live_BK: Tensor
    """Whether the slot holds a chosen position."""


def choose(
    difficulty_BT: Tensor | None,
    valid_BT: Tensor,
    config: GradientConfig,
    ratio: float,
    generator: torch.Generator | None = None,
) -> Chosen:
    """Choose ceil(ratio * valid tokens) of each row; at ratio 1 every valid one, at weight 1.

    "sampled" and "uniform" weigh a position by 1 / its probability of being chosen, which is at
    most 1 / (mix * ratio), and 1 / ratio: the loss is that of all tokens on average. The others
    weigh all alike, n / k, and so train the mean loss of those that they choose.
    """
    return _chosen(*mask_and_weights(difficulty_BT, valid_BT, config, ratio, generator))


def mask_and_weights(
    difficulty_BT: Tensor | None,
    valid_BT: Tensor,
    config: GradientConfig,
    ratio: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """What `choose` chooses, as a mask and weights of static shape (B, T); nothing is waited for.

    A weight holds where the mask does.
    """
    if not 0 < ratio <= 1:
        raise InvalidInput(f"ratio = {ratio!r}: give a share above 0, up to 1")
    assert valid_BT.dim() == 2 and valid_BT.dtype == torch.bool
    if config.selection == "all" or ratio == 1:
        return valid_BT, valid_BT.float()
    if difficulty_BT is None:
        if config.selection != "uniform":
            raise InvalidInput(
                f"selection = {config.selection!r} tells tokens apart, and there are no scores: "
                'give some, or take selection="uniform"'
            )
        difficulty_BT = torch.zeros_like(valid_BT, dtype=torch.float32)
    if difficulty_BT.shape != valid_BT.shape:
        raise InvalidInput(
            f"scores of shape {tuple(difficulty_BT.shape)} for positions of {tuple(valid_BT.shape)}"
        )
    batch = _Batch(difficulty_BT.detach(), valid_BT, config, ratio, generator)
    return _RULES[config.selection](batch)


def quota(count: Tensor, ratio: float) -> Tensor:
    """ceil(ratio * count), where .1 * 30 is 3 (and not, as in floating point, a little more)."""
    exact = count.to(wide(count)) * ratio
    return torch.minimum((exact * (1 - 1e-9)).ceil().long(), count)


@dataclass(frozen=True, eq=False)
class _Batch:
    difficulty_BT: Tensor
    valid_BT: Tensor
    config: GradientConfig
    ratio: float
    generator: torch.Generator | None

    @property
    def count_B(self) -> Tensor:
        return self.valid_BT.sum(-1)

    @property
    def k_B(self) -> Tensor:
        return quota(self.count_B, self.ratio)

    @property
    def start_B(self) -> Tensor:
        return starts(len(self.valid_BT), self.valid_BT.device, self.generator)

    @property
    def hardest_first_BT(self) -> Tensor:
        """Positions by falling score, equal ones as they stand, invalid ones last."""
        lowest = torch.finfo(torch.float32).min
        sane_BT = torch.nan_to_num(self.difficulty_BT.float(), nan=lowest)
        return sane_BT.masked_fill(~self.valid_BT, -torch.inf).argsort(
            dim=-1, descending=True, stable=True
        )


_Rule = Callable[[_Batch], tuple[Tensor, Tensor]]
"""Gives the mask of the chosen and the weights, both (B, T)."""


def _sampled(batch: _Batch) -> tuple[Tensor, Tensor]:
    size_BT = mixed(batch.difficulty_BT, batch.valid_BT, batch.config.mix)
    share_BT = inclusion(size_BT, batch.valid_BT, batch.k_B)
    mask_BT = systematic(share_BT, batch.valid_BT, batch.k_B, batch.start_B)
    return mask_BT, 1 / share_BT


def _uniform(batch: _Batch) -> tuple[Tensor, Tensor]:
    share_BT = inclusion(batch.valid_BT.float(), batch.valid_BT, batch.k_B)
    mask_BT = systematic(share_BT, batch.valid_BT, batch.k_B, batch.start_B)
    return mask_BT, 1 / share_BT


def _topk(batch: _Batch) -> tuple[Tensor, Tensor]:
    mask_BT = _ranks(batch.hardest_first_BT) < batch.k_B.unsqueeze(-1)
    return mask_BT, _even(batch.count_B, batch.k_B).unsqueeze(-1).expand_as(mask_BT)


def _stratified(batch: _Batch) -> tuple[Tensor, Tensor]:
    """Buckets of equal size by difficulty; of S the hardest gets S parts, the easiest 1.

    Drawn systematically along the ranks, so that each bucket gets its part to within one token.
    """
    order_BT, strata = batch.hardest_first_BT, batch.config.num_strata
    rank_BT = torch.arange(order_BT.shape[-1], device=order_BT.device).expand_as(order_BT)
    ranked_BT = rank_BT < batch.count_B.unsqueeze(-1)
    bucket_BT = rank_BT * strata // batch.count_B.clamp(min=1).unsqueeze(-1)
    share_BT = inclusion(strata - bucket_BT, ranked_BT, batch.k_B)
    drawn_BT = systematic(share_BT, ranked_BT, batch.k_B, batch.start_B)
    mask_BT = torch.zeros_like(drawn_BT).scatter(-1, order_BT, drawn_BT)
    return mask_BT, _even(batch.count_B, batch.k_B).unsqueeze(-1).expand_as(mask_BT)


def _sequence_aware(batch: _Batch) -> tuple[Tensor, Tensor]:
    """Some of each row, then the hardest of the batch: k is the batch's, and so is n / k."""
    valid_BT, least = batch.valid_BT, batch.config.min_tokens_per_sequence
    due_BT = (_ranks(batch.hardest_first_BT) < least) & valid_BT
    total = torch.maximum(quota(valid_BT.sum(), batch.ratio), due_BT.sum())
    # Those that are due come first, then the other valid ones by score.
    lowest, highest = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
    score_BT = torch.nan_to_num(batch.difficulty_BT.float(), nan=lowest).clamp(lowest, highest)
    score_BT = score_BT.masked_fill(due_BT, torch.inf).masked_fill(~valid_BT, -torch.inf)
    order_1N = score_BT.reshape(1, -1).argsort(dim=-1, descending=True, stable=True)
    mask_BT = (_ranks(order_1N) < total).view_as(valid_BT)
    return mask_BT, _even(valid_BT.sum(), total).expand_as(mask_BT)


_RULES: dict[str, _Rule] = {
    "sampled": _sampled,
    "uniform": _uniform,
    "topk": _topk,
    "stratified": _stratified,
    "sequence_aware": _sequence_aware,
    # The hardest as well; what is fixed is the ratio, which no confidence moves (see Schedule).
    "fixed_quota": _topk,
}


def _ranks(order_BT: Tensor) -> Tensor:
    """The place of each position in an order."""
    places_BT = torch.arange(order_BT.shape[-1], device=order_BT.device).expand_as(order_BT)
    return torch.empty_like(order_BT).scatter_(-1, order_BT, places_BT)


def _even(count: Tensor, k: Tensor) -> Tensor:
    return count / k.clamp(min=1)


def _chosen(mask_BT: Tensor, weight_BT: Tensor) -> Chosen:
    k_B = mask_BT.sum(-1)
    widest = max(1, int(k_B.max())) if k_B.numel() else 0  # the one time the device is waited for
    slots_K = torch.arange(min(widest, mask_BT.shape[-1]), device=mask_BT.device)
    live_BK = slots_K < k_B.unsqueeze(-1)
    place_BK = torch.minimum(slots_K, (k_B.unsqueeze(-1) - 1).clamp(min=0))
    positions_BK = (~mask_BT).to(torch.uint8).argsort(dim=-1, stable=True).gather(-1, place_BK)
    weights_BK = weight_BT.gather(-1, positions_BK).float().masked_fill(~live_BK, 0.0)
    return Chosen(positions_BK, weights_BK, live_BK)
