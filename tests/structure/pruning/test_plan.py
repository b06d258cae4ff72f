"""A plan saves what was asked for, and loses least of what was tried."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.structure.pruning.test_prune import gpt2, likely_text, llama, text

from pliant.errors import InvalidInput, UnsupportedModel
from pliant.structure import PlanConfig, PruneConfig, perplexity, plan_pruning, prune
from pliant.structure.pruning.plan import levels_of


def spare_channels(model: Any) -> Any:
    """A model of whose channels half do next to nothing."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] *= 1e-3
    return model


@pytest.mark.parametrize("of", ["parameters", "flops"])
def test_the_plan_takes_what_the_model_can_spare(of: Any) -> None:
    model = spare_channels(llama(num_hidden_layers=4, intermediate_size=64))
    config = PlanConfig(0.15, of, ("heads", "channels", "layers"))
    own = likely_text(model)
    plan = plan_pruning(model, own[1:], own[:1], config)
    assert plan.config.parts == ("channels",)
    assert plan.best.saved >= 0.97 * 0.15
    enough = [p for p in plan.points if p.saved >= 0.97 * 0.15 and p.config.compensate]
    assert plan.best.perplexity == min(point.perplexity for point in enough)


def test_a_mixture_of_parts_wins_where_each_can_spare_a_little() -> None:
    """A quarter of the channels and of the heads do next to nothing, and neither is enough."""
    model = llama(num_hidden_layers=4, intermediate_size=64)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.mlp.up_proj, layer.mlp.down_proj, layer.self_attn.o_proj):
                weight.weight.mul_(10)
            layer.mlp.down_proj.weight[:, ::4] *= 1e-5
            layer.self_attn.o_proj.weight[:, :16] *= 1e-5
    own = likely_text(model)
    config = PlanConfig(0.2, parts=("channels", "heads"), score="activation", compensate=False)
    plan = plan_pruning(model, own[1:], own[:1], config, controls=False)
    assert plan.config.parts == ("heads", "channels") and plan.best.saved >= 0.2
    assert plan.best.perplexity < 1.0001 * plan.whole
    alone = [point for point in plan.points if len(point.config.parts) == 1 and point.saved >= 0.2]
    assert len(alone) == 2 and all(p.perplexity > 1.005 * plan.whole for p in alone)


def test_what_is_planned_is_what_is_pruned() -> None:
    model = llama(num_hidden_layers=4)
    plan = plan_pruning(model, text(), text(1), PlanConfig(0.3, parts=("layers",)))
    prune(model, text(), plan.config, layer_order=plan.layer_order)
    assert perplexity(model, text(1)) == plan.best.perplexity


def test_a_known_order_of_layers_is_used() -> None:
    model, config = llama(num_hidden_layers=4), PlanConfig(0.3, parts=("layers",))
    chosen = plan_pruning(model, text(), text(1), config, controls=False).layer_order
    other = tuple(reversed([*chosen, *({0, 1, 2, 3} - set(chosen))]))
    plan = plan_pruning(model, text(), text(1), config, controls=False, layer_order=other)
    assert plan.layer_order == other != chosen
    prune(model, text(), plan.config, layer_order=other)
    assert perplexity(model, text(1)) == plan.best.perplexity


def test_every_part_is_tried_alone() -> None:
    plan = plan_pruning(llama(), text(), text(1), PlanConfig(0.2, parts=("channels", "heads")))
    tried = {point.config.parts for point in plan.points}
    assert {("channels",), ("heads",)} <= tried
    scores = {point.config.score for point in plan.points}
    assert scores == {"error", "random", "magnitude"}
    assert plan.as_dict()["points"][0]["saved"] > 0


def test_half_of_a_budget_of_the_cache_is_heads_or_layers() -> None:
    plan = plan_pruning(llama(num_hidden_layers=4), text(), text(1), PlanConfig(0.25, "kv"))
    assert "channels" not in plan.config.parts
    assert plan.best.saved >= 0.97 * 0.25


def test_a_latency_is_planned_for() -> None:
    """Whether it is met depends on the machine; that it is measured does not."""
    model = llama(num_hidden_layers=4)
    try:
        plan = plan_pruning(model, text(), text(1), PlanConfig(0.02, "latency", ("layers",)))
    except InvalidInput as error:  # on a busy machine fewer layers may not seem faster
        assert "latency is more than layers can give" in str(error)
    else:
        assert plan.costs.of == "latency" and plan.config.parts == ("layers",)


def test_given_shares_are_measured_beside_controls() -> None:
    config = PruneConfig(channels=0.5)
    plan = plan_pruning(llama(), text(), text(1), config)
    assert plan.config == config
    assert {point.config.score for point in plan.points} == {"error", "random", "magnitude"}
    assert sorted({point.config.channels for point in plan.points}) == [0.25, 0.5]
    alone = plan_pruning(llama(), text(), text(1), config, controls=False)
    assert {point.config.score for point in alone.points} == {"error"}


def test_the_model_is_as_it_was() -> None:
    model = llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan_pruning(model, text(), text(1), PlanConfig(0.2))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "pliant")


def test_a_part_without_a_smaller_form_stays() -> None:
    plan = plan_pruning(gpt2(), text(), text(1), PlanConfig(0.1, parts=("heads", "channels")))
    assert plan.config.parts == ("channels",)
    with pytest.raises(UnsupportedModel, match="no stock form of fewer heads"):
        plan_pruning(gpt2(), text(), text(1), PruneConfig(heads=0.25))
    with pytest.raises(UnsupportedModel, match="no stock form of fewer heads"):
        plan_pruning(gpt2(), text(), text(1), PlanConfig(0.1, parts=("heads",)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0}, "budget = 0"),
        ({"budget": 1.5}, "budget = 1.5"),
        ({"budget": 0.2, "of": "money"}, "of = 'money'"),
        ({"budget": 0.2, "parts": ()}, "name one of"),
        ({"budget": 0.2, "parts": ("tails",)}, "parts = 'tails'"),
        ({"budget": 0.2, "parts": ("heads", "heads")}, "name each part once"),
        ({"budget": 0.2, "score": "best"}, "score = 'best'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        PlanConfig(**options)


def test_a_budget_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"0.9 of parameters is more than channels can give"):
        plan_pruning(llama(), text(), text(1), PlanConfig(0.9, parts=("channels",)))


def test_a_label_says_what_really_goes() -> None:
    """17% of four layers is one of them."""
    plan = plan_pruning(llama(num_hidden_layers=4), text(), text(1), PruneConfig(layers=0.17))
    assert str(plan).startswith("25% of layers by error")
    assert {point.removed["layers"] for point in plan.points} == {0.25}


def test_levels_are_shares_that_can_be_removed() -> None:
    assert levels_of(llama(), "heads").tolist() == [0.25, 0.5, 0.75]
    assert len(levels_of(llama(num_hidden_layers=5), "layers")) == 4
    assert float(levels_of(llama(), "channels")[-1]) <= 0.9
