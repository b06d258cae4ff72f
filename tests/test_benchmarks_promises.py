"""The limit that benchmarks/promises.py compares goals with is that of the best test there is."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.promises_limit import power
from scipy.stats import binom


@pytest.mark.parametrize(("n", "lost"), [(60, 0.01), (300, 0.02), (1500, 0.04)])
def test_without_gains_it_is_the_binomial_test(n: int, lost: float) -> None:
    """Of 95 % of the quality: a loss is .95 too many, and both right .05 too few."""
    most = int(binom.ppf(0.05, n, 0.05))
    part = (0.05 - binom.cdf(most - 1, n, 0.05)) / binom.pmf(most, n, 0.05)
    exact = binom.cdf(most - 1, n, lost) + part * binom.pmf(most, n, lost)
    assert power(np.array([lost, 1 - lost]), np.array([19, -1]), n, 0.05) == pytest.approx(exact)


def test_a_broken_goal_is_never_proved_and_a_sure_one_always() -> None:
    assert power(np.array([0.05, 0.95]), np.array([19, -1]), 300, 0.05) == 0.0
    assert power(np.array([0.5, 0.5]), np.array([0, -1]), 300, 0.05) == 1.0
