"""What mixtures should lose agrees with what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

from pliant.structure.config import Part
from pliant.structure.pruning.mixtures import Losses

ALONE: Mapping[Part, list[tuple[float, float]]] = {
    "channels": [(0.2, 0.1), (0.4, 0.3)],
    "layers": [(0.1, 0.05), (0.2, 0.2)],
}


def predicted(losses: Losses, **shares: float) -> float:
    return float(losses.predict({part: torch.tensor(s) for part, s in shares.items()}))  # type: ignore[misc]


def lost(channels: float, layers: float, excess: float) -> float:
    """Powers through the points of ALONE, and what the two lose beyond their sum."""
    own, other = 0.3 * (channels / 0.4) ** math.log2(3), 0.2 * (layers / 0.2) ** 2
    return own + other + excess * math.sqrt(own * other)


def test_what_was_measured_alone_is_predicted() -> None:
    losses = Losses(ALONE, [({"channels": 0.2, "layers": 0.1}, 0.9)])
    for part, points in ALONE.items():
        for share, loss in points:
            assert predicted(losses, **{part: share}) == pytest.approx(loss)


def test_losses_of_parts_add_up_until_a_mixture_is_measured() -> None:
    assert predicted(Losses(ALONE), channels=0.2, layers=0.1) == pytest.approx(0.1 + 0.05)


@pytest.mark.parametrize("excess", [-0.5, 0.0, 1.5])
def test_mixtures_say_what_others_lose_beyond_the_sum(excess: float) -> None:
    measured = [({"channels": c, "layers": s}, lost(c, s, excess)) for c, s in [(0.1, 0.15)]]
    losses = Losses(ALONE, measured)  # type: ignore[arg-type]
    assert losses.excess == pytest.approx(excess, abs=1e-6)
    assert predicted(losses, channels=0.3, layers=0.05) == pytest.approx(lost(0.3, 0.05, excess))


def test_a_mixture_loses_no_less_than_its_parts() -> None:
    """Whatever one lucky measurement says: the least is that of two parts that lose the same."""
    losses = Losses(ALONE, [({"channels": 0.2, "layers": 0.1}, -0.5)])
    assert predicted(losses, channels=0.2, layers=0.1) >= 0.05


def test_a_part_that_was_not_measured_is_left_alone() -> None:
    losses = Losses(ALONE)
    assert predicted(losses, heads=0.0, channels=0.2) == pytest.approx(0.1)
    assert predicted(losses, heads=0.1, channels=0.2) > 1e5


def test_the_middle_is_tried_where_a_part_cannot_save_half_of_the_budget() -> None:
    """Of .6, channels can save .5 at most and heads .18, so heads are never measured alone."""
    levels = torch.linspace(0, 1, 41, dtype=torch.float64)
    channels, heads = torch.meshgrid(levels, levels, indexing="ij")
    enough = 0.5 * channels + 0.18 * heads >= 0.6
    loss = 0.3 * channels**2 + 0.13 * heads**2
    mixtures: list[tuple[dict[Part, float], float]] = []
    for _ in range(3):
        losses = Losses({"channels": [(0.6, 0.3 * 0.6**2)]}, mixtures)
        expected = losses.predict({"channels": channels, "heads": heads})
        best = int(torch.where(enough, expected, torch.inf).argmin())
        shares = {"channels": channels.flatten()[best], "heads": heads.flatten()[best]}
        mixtures.append(({p: float(s) for p, s in shares.items()}, float(loss.flatten()[best])))  # type: ignore[misc]
    assert any(0.65 < shares["heads"] < 0.9 for shares, _ in mixtures)
    assert min(loss for _, loss in mixtures) == pytest.approx(float(loss[enough].min()))
