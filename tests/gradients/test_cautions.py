"""Whoever asks for a rule that trains another loss is told so, where he asks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from tests.minimal_adapter import tiny_llama

from pliant.gradients import GradientConfig, attach
from pliant.gradients.cautions import BIASED, BiasedWarning


@pytest.mark.parametrize("selection", BIASED)
def test_it_is_said_once_and_where_it_is_asked_for(selection: Any) -> None:
    with pytest.warns(BiasedWarning, match=f"{selection}.*docs/gradients-seed.md") as told:
        attach(tiny_llama(), GradientConfig(selection=selection)).detach()
    assert len(told) == 1 and told[0].filename == __file__


@pytest.mark.parametrize(
    "settings",
    [{}, {"selection": "uniform"}, {"selection": "topk", "ratio": 1.0}, {"engine": "completion"}],
)
def test_of_others_there_is_nothing_to_say(settings: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(tiny_llama(), GradientConfig(**settings)).detach()
