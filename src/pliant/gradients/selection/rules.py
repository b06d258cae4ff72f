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


@dataclass(frozen=True, eq=False)
class Chosen:
    """The positions to train, row by row."""

    positions_BK: Tensor
    """Ascending; slots beyond a row's own number repeat its last one (0 in a row without any)."""
    weights_BK: Tensor
    """The weight of each in the loss, in fp32; 0 in the slots beyond."""
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
    """The choice as a mask and weights of static shape (B, T), without synchronizing.

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
                f"selection = {config.selection!r} needs scores, and there are none: pass "
                'some, or use selection="uniform"'
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
    """A few of each row, then the hardest of the batch: k and n / k are those of the batch."""
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
    widest = max(1, int(k_B.max())) if k_B.numel() else 0  # the only synchronization
    slots_K = torch.arange(min(widest, mask_BT.shape[-1]), device=mask_BT.device)
    live_BK = slots_K < k_B.unsqueeze(-1)
    place_BK = torch.minimum(slots_K, (k_B.unsqueeze(-1) - 1).clamp(min=0))
    positions_BK = (~mask_BT).to(torch.uint8).argsort(dim=-1, stable=True).gather(-1, place_BK)
    weights_BK = weight_BT.gather(-1, positions_BK).float().masked_fill(~live_BK, 0.0)
    return Chosen(positions_BK, weights_BK, live_BK)


# --- systematic sampling -------------------------------------------------------------------------

# A sum over the drawn tokens, each divided by its probability of being drawn, is on average the sum
# over all of them (Horvitz and Thompson). Systematic sampling lays the probabilities end to end on
# a line of length k and takes whatever lies at u, u + 1, u + 2, ...: one random number a row.


def inclusion(size_BT: Tensor, valid_BT: Tensor, k_B: Tensor) -> Tensor:
    """Probabilities in proportion to the sizes, that sum to k in each row; none exceeds 1.

    What would exceed it is certain, and the rest shares what is left, until none exceeds it.
    """
    size_BT = size_BT.to(wide(size_BT)).masked_fill(~valid_BT, 0.0)
    falling_BT = size_BT.sort(dim=-1, descending=True).values
    rest_BT = falling_BT.flip(-1).cumsum(-1).flip(-1)
    left_BT = k_B.unsqueeze(-1) - torch.arange(size_BT.shape[-1], device=size_BT.device)
    certain_B1 = (falling_BT * left_BT > rest_BT).sum(-1, keepdim=True)
    rest_B1 = torch.cat((rest_BT, torch.zeros_like(rest_BT[:, :1])), -1).gather(-1, certain_B1)
    scale_B1 = (k_B.unsqueeze(-1) - certain_B1) / rest_B1
    share_BT = (size_BT * scale_B1).nan_to_num(0.0).clamp(max=1)
    all_of_it = (k_B >= valid_BT.sum(-1)).unsqueeze(-1)
    return torch.where(all_of_it, valid_BT.to(share_BT.dtype), share_BT)


def mixed(score_BT: Tensor, valid_BT: Tensor, mix: float) -> Tensor:
    """Sizes that follow the scores but for `mix` of them, which is spread evenly.

    A score below 0, and one that is no number, counts as 0; where all are 0, all are alike.
    """
    score_BT = torch.nan_to_num(score_BT.float(), nan=0.0).clamp(min=0)
    score_BT = score_BT.to(wide(score_BT)).masked_fill(~valid_BT, 0.0)
    total_B1 = score_BT.sum(-1, keepdim=True)
    even_BT = valid_BT.to(score_BT.dtype) / valid_BT.sum(-1, keepdim=True).clamp(min=1)
    by_score_BT = torch.where(total_B1 > 0, score_BT / total_B1, even_BT)
    return (1 - mix) * by_score_BT + mix * even_BT


def systematic(share_BT: Tensor, valid_BT: Tensor, k_B: Tensor, start_B: Tensor) -> Tensor:
    """The mask of the drawn: exactly k a row, for any `start` in [0, 1)."""
    line_BT = share_BT.masked_fill(~valid_BT, 0.0).to(wide(share_BT)).cumsum(-1)
    line_BT = line_BT * (k_B.unsqueeze(-1) / line_BT[:, -1:].clamp(min=torch.finfo().tiny))
    passed_BT = (line_BT - start_B.unsqueeze(-1)).ceil().long()
    # Sums are rounded: none may be drawn twice, nor one be missing in the end.
    nth_BT = valid_BT.cumsum(-1)
    passed_BT = nth_BT + (passed_BT - nth_BT).clamp(max=0).cummin(-1).values
    passed_BT = torch.maximum(passed_BT, k_B.unsqueeze(-1) - (nth_BT[:, -1:] - nth_BT))
    passed_BT = torch.minimum(passed_BT.clamp(min=0), k_B.unsqueeze(-1))
    return passed_BT.diff(dim=-1, prepend=torch.zeros_like(passed_BT[:, :1])) > 0


def starts(rows: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """One random number a row; a generator may live on another device than the scores."""
    home = device if generator is None else generator.device
    drawn = torch.rand(rows, generator=generator, device=home, dtype=wide_on(home))
    return drawn.to(device, wide_on(device))


def wide(tensor: Tensor) -> torch.dtype:
    return wide_on(tensor.device)


def wide_on(device: torch.device) -> torch.dtype:
    """Sums over many thousand tokens are taken in fp64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
