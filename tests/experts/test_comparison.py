"""Where an expert changes its base and where two differ, by layer and projection."""

from __future__ import annotations

import json
from math import isnan

import pytest
import torch
from tests.experts.models import with_experts

from pliant.anatomy.tiny import tiny_model
from pliant.experts.comparison import Comparison, Profile, columns
from pliant.experts.expert import Expert
from pliant.experts.factors import singular_values
from pliant.experts.model import svf_layers

MODEL = with_experts("math", "code")
MATH, CODE = (Expert.of(MODEL, name) for name in ("math", "code"))
PATH = "model.layers.1.mlp.up_proj"


def changed_in(path: str, expert: Expert = MATH, by: float = 3.0) -> Expert:
    return Expert({**expert.changes, path: expert.changes[path] + by}, expert.settings)


def test_a_profile_says_where_an_expert_does_most() -> None:
    profile = Profile.of(changed_in(PATH))
    most = max(profile.matrices, key=lambda m: m.change)
    assert (most.layer, most.projection, most.path) == (1, "mlp.up_proj", PATH)
    assert "layer 1's mlp.up_proj" in str(profile)
    assert most.change == pytest.approx(
        float((MATH.changes[PATH] + 3).square().mean().sqrt()), rel=1e-5
    )
    assert profile.layers == [0, 1]
    assert json.loads(json.dumps(profile.as_dict()))["matrices"][0]["layer"] == 0


def test_with_singular_values_it_is_relative_to_the_weights() -> None:
    profile = Profile.of(MATH, singular_values(MODEL))
    own = {m.path: m.change for m in profile.matrices}
    for path, layer in svf_layers(MODEL.base_model.model):
        delta, weight = layer.get_delta_weight("math"), layer.own_weight()
        assert own[path] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-4)
    assert "%" in str(profile)


def test_a_comparison_says_where_two_experts_differ_most() -> None:
    comparison = Comparison.of(MATH, changed_in(PATH), names=("old", "new"))
    assert "old and new differ by" in str(comparison)
    assert "most in layer 1's mlp.up_proj" in str(comparison)
    differences = {m.path: m.difference for m in comparison.matrices}
    assert differences.pop(PATH) == pytest.approx(3, rel=1e-5)
    assert set(differences.values()) == {0.0}
    assert comparison.distance == pytest.approx(MATH.distance(changed_in(PATH)))
    cosines = {m.path: m.cosine for m in Comparison.of(MATH, CODE).matrices}
    assert cosines[PATH] == pytest.approx(
        float(torch.cosine_similarity(MATH.changes[PATH], CODE.changes[PATH], dim=0)), rel=1e-4
    )


def test_equal_experts_and_the_base_are_named_so() -> None:
    assert "are equal" in str(Comparison.of(MATH, MATH))
    assert "this expert is the base" in str(Profile.of(0 * MATH))


def test_a_grid_has_a_cell_for_each_projection_and_layer() -> None:
    comparison = Comparison.of(MATH, CODE)
    assert list(comparison.grids()) == ["the first", "the second", "where they differ"]
    grid = comparison.grid()
    assert len(grid) == 7 and {len(cells) for cells in grid.values()} == {2}
    some = Profile.of(
        Expert.of(with_experts("x", layers_to_transform=[1], target_modules=["q_proj"]), "x")
    )
    assert columns(some.matrices) == [1] and some.layers == [1]


def test_hybrids_and_mixtures_have_cells_where_they_have_matrices() -> None:
    profile = Profile.of(Expert.of(with_experts("x", model=tiny_model("jamba")), "x"))
    grid = profile.grid()
    assert isnan(grid["self_attn.q_proj"][0]) and not isnan(grid["self_attn.q_proj"][1])
    stacked = [name for name in grid if "experts" in name]
    assert stacked == ["feed_forward.experts", "feed_forward.experts (2)"]


def test_experts_in_modules_of_their_own_share_a_cell() -> None:
    """As mixtures whose experts are separate projections."""
    changes = {f"layers.0.experts.{i}.up": torch.full((4,), float(v)) for i, v in enumerate((3, 4))}
    grid = Profile.of(Expert(changes, {})).grid()
    assert grid == {"experts.*.up": [pytest.approx((25 / 2) ** 0.5)]}


def test_what_lies_outside_the_layers_has_a_column_of_its_own() -> None:
    changes = {"lm_head": torch.ones(4), "layers.2.up": torch.ones(4)}
    profile = Profile.of(Expert(changes, {}))
    assert columns(profile.matrices) == [None, 2]
    assert profile.grid()["lm_head"][0] == 1 and isnan(profile.grid()["up"][0])
