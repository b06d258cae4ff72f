"""Tests choose by the hardest tokens, for these are known: that it is warned of is asked once."""

from __future__ import annotations

import warnings

import pytest

from pliant.gradients.cautions import BiasedWarning


@pytest.fixture(autouse=True)
def no_word_of_biased_rules() -> None:
    warnings.simplefilter("ignore", BiasedWarning)
