"""Each strategy ranks the closed heads by what it says."""

from __future__ import annotations

from typing import Any

import torch
from tests.minimal_adapter import logits
from tests.structure.plasticity.models import BATCHES, ids, model_of
from torch import nn

from pliant.anatomy import Anatomy
from pliant.anatomy.find import device_of
from pliant.structure import Gates, attach, importance
from pliant.structure.calibration import samples_of
from pliant.structure.plasticity.config import Growth
from pliant.structure.plasticity.growth import loss_decreases, mean_loss, ranked
from pliant.structure.ranking.importance import ImportanceConfig

EVERY = [(str(layer), head) for layer in (0, 1) for head in range(4)]


def order(
    gates: Gates, growth: Growth, closed: Any = EVERY, seed: int = 0, batch: Any = None
) -> Any:
    batches = BATCHES if batch is None else [batch]
    samples = samples_of(batches, device_of(gates.base))
    return ranked(gates, closed, growth, batches, samples, seed)


def close(gates: Gates, heads: Any) -> None:
    with torch.no_grad():
        for key, head in heads:
            gates["heads", int(key)][head] = 0


def output_weights(model: nn.Module, layer: int, head: int) -> Any:
    attention: Any = Anatomy.of(model).layers[layer].self_attn
    width = attention.head_dim
    return attention.o_proj.weight[:, head * width : (head + 1) * width]


def test_the_head_whose_removal_hurts_most_grows_first_by_gradient() -> None:
    """A model that predicts its own most likely tokens needs the head that has large weights."""
    model = model_of()
    with torch.no_grad():
        for key, head in EVERY:
            output_weights(model, int(key), head).mul_(0.05)
        output_weights(model, 1, 2).mul_(60)
        answers = model(input_ids=ids(8, 0), use_cache=False).logits.argmax(-1)
    labels = torch.cat([answers[:, :1], answers[:, :-1]], dim=1)
    batch = {"input_ids": ids(8, 0), "labels": labels}
    gates = attach(model)
    cost = importance(model, [batch], ImportanceConfig(("heads",), "leave_one_out")).units["heads"]
    most = max(EVERY, key=lambda head: float(cost[head[0]][head[1]]))
    close(gates, EVERY)
    assert most == ("1", 2) and order(gates, "gradient", batch=batch)[0] == most


def test_a_gradient_is_what_opening_a_gate_a_little_takes_off_the_loss() -> None:
    gates = attach(model_of()).requires_grad_(False)
    close(gates, EVERY[::2])
    samples = samples_of(BATCHES, torch.device("cpu"))
    promised = loss_decreases(gates, samples)
    assert not any(p.requires_grad for p in gates.parameters()), "flags are restored"
    for key, head in (EVERY[0], EVERY[6]):
        gate = gates["heads", int(key)]
        losses = []
        for value in (-0.01, 0.01):
            gate.data[head] = value
            losses.append(mean_loss(gates.base, samples))
        gate.data[head] = 0
        measured = (losses[0] - losses[1]) / 0.02
        assert abs(measured - float(promised[key][head])) < 1e-3


def test_the_most_focused_head_grows_first_by_the_entropy_gap() -> None:
    model = model_of()
    attention: Any = Anatomy.of(model).layers[1].self_attn
    width = attention.head_dim
    with torch.no_grad():
        attention.q_proj.weight[2 * width : 3 * width] *= 100  # nearly one position
        attention.q_proj.weight[:width] = 0  # all positions alike
    gates = attach(model)
    close(gates, EVERY)
    ranking = order(gates, "entropy_gap")
    assert ranking[0] == ("1", 2) and ranking[-1] == ("1", 0)


def test_balanced_growth_fills_the_emptiest_layer_first() -> None:
    gates = attach(model_of())
    closed = [("0", 0), ("1", 0), ("1", 1), ("1", 2), ("1", 3)]
    close(gates, closed)
    ranking, best = order(gates, "balanced", closed), order(gates, "gradient", closed)
    assert [key for key, _ in ranking[:3]] == ["1", "1", "1"]
    assert [h for h in ranking if h[0] == "1"] == [h for h in best if h[0] == "1"]


def test_random_growth_depends_on_the_seed_alone() -> None:
    gates = attach(model_of())
    orders = [order(gates, "random", seed=seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == EVERY


def test_ranking_leaves_the_model_as_it_was() -> None:
    gates = attach(model_of())
    close(gates, EVERY[:3])
    before, mode = logits(gates.base), gates.base.training
    for growth in ("gradient", "entropy_gap", "balanced"):
        order(gates, growth, EVERY[:3])  # type: ignore[arg-type]
    assert torch.equal(logits(gates.base), before) and gates.base.training == mode
    assert all(p.grad is None for p in gates.base.parameters())
