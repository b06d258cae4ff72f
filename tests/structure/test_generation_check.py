"""The check that models generate: with gates as without, and with a share of their heads pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.structure.models import ARCHITECTURES, IDS, model, saved
from torch import nn

from pliant.errors import InvalidInput
from pliant.structure import attach
from pliant.structure.generation_check import (
    CheckConfig,
    CheckResult,
    check_generation,
    choose_heads,
)

BATCH = {"input_ids": IDS}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_of_the_table_works(name: str, tmp_path: Path) -> None:
    folder = str(saved(name, tmp_path / name))
    result = check_generation(folder, CheckConfig(max_length=24))
    assert result.ok and result.reason == ""
    assert result.architecture == ARCHITECTURES[name]
    assert result.pruned == result.heads // 2 > 0
    assert 0 <= result.unchanged <= result.new_tokens == 5
    assert result.text.startswith("The future of AI is")
    assert f"{folder} ({result.architecture}) works with gates" in str(result)


def places(gates: Any, **config: Any) -> set[tuple[int, int]]:
    chosen = choose_heads(gates, CheckConfig(**config), BATCH)
    return {(site.layer, head) for site, head in chosen}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_magnitude_takes_the_heads_with_the_smallest_output_weights(name: str) -> None:
    gates = attach(model(name))
    site = gates.sites[1]
    weight: Any = site.module.weight
    with torch.no_grad():
        weight.narrow(site.axis, 2 * site.width, site.width).mul_(0.01)
    share = 1.5 / sum(site.count for site in gates.sites)
    assert places(gates, strategy="magnitude", pruning=share) == {(1, 2)}


def test_entropy_takes_the_heads_with_the_most_even_attention() -> None:
    base = model("gpt2")
    gates = attach(base)
    with torch.no_grad():  # no queries: head 3 of layer 2 attends to all positions alike
        attention: Any = base.transformer.h[2].attn.c_attn
        attention.weight[:, 48:64] = 0
        attention.bias[48:64] = 0
    assert places(gates, strategy="entropy", pruning=1.5 / 16) == {(2, 3)}


def test_random_pruning_is_the_same_for_one_seed() -> None:
    gates = attach(model())
    chosen = [places(gates, seed=seed) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and len(chosen[0]) == 8


def test_packed_weights_have_no_magnitude() -> None:
    gates = attach(model())
    module: Any = gates.sites[0].module
    module.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InvalidInput, match="packed"):
        places(gates, strategy="magnitude")
    assert places(gates, strategy="random")


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("nano-x", {}, "'nano-x'"),
        ("nano-s", {"max_length": 5}, "the prompt has 19 tokens"),
        ("nano-s", {"pruning": 0.05}, "has only 9 heads"),
    ],
)
def test_what_cannot_be_checked_is_a_result(name: str, config: Any, reason: str) -> None:
    result = check_generation(name, CheckConfig(**config))
    assert not result.ok and reason in result.reason and str(result).startswith(f"{name}: ")


def test_a_model_without_attention_is_a_result(tmp_path: Path) -> None:
    result = check_generation(str(saved("mamba", tmp_path)))
    assert not result.ok and "no heads to gate" in result.reason


def test_one_failed_question_is_enough_to_fail() -> None:
    answers = ("generates", "identical", "pruned_generates", "restored")
    assert CheckResult("a", **dict.fromkeys(answers, True)).ok
    for name in answers:
        result = CheckResult("a", **{**dict.fromkeys(answers, True), name: False})
        assert not result.ok and not result.as_dict()["ok"] and "fails with gates" in str(result)


@pytest.mark.parametrize(
    "config", [{"pruning": 0.0}, {"pruning": 1.0}, {"strategy": "best"}, {"max_length": 1}]
)
def test_settings_that_cannot_be_are_refused(config: Any) -> None:
    with pytest.raises(InvalidInput, match=next(iter(config))):
        CheckConfig(**config)
