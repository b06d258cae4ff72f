"""Draw exactly k of n tokens, each with a probability of its own, and say what it weighs then.

A sum over the drawn tokens, each divided by its probability of being drawn, is on average the sum
over all of them (Horvitz and Thompson). Systematic sampling lays the probabilities end to end on a
line of length k and takes whatever lies at u, u + 1, u + 2, ...: one random number a row.

B is rows, T positions. What is not `valid` is never drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
