"""Pruned heads stay as they were, grow again without a jump, and learn at a rate of their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.minimal_adapter import anatomy_of, logits, same_anatomy
from tests.structure.plasticity.models import (
    BATCHES,
    HELD_OUT,
    SHORT,
    closed_heads,
    head_weights,
    ids,
    model_of,
    optimizer_of,
    plasticity_of,
    train,
    trainer_of,
)
from torch import Tensor

from pliant.anatomy.tiny import tiny_model
from pliant.errors import AdapterError, InvalidInput, UnsupportedModel
from pliant.structure import (
    AgencyConfig,
    GateConfig,
    Plasticity,
    PlasticityConfig,
    PruneConfig,
    attach,
    attach_agency,
    attach_plasticity,
    compare_regrowth,
    export,
    make_plastic,
    prune,
)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# --- what is kept ---------------------------------------------------------------------------------


def test_attaching_changes_no_bit_and_comes_off_without_a_trace() -> None:
    model = model_of()
    gates = attach(model)
    before, parts = logits(model), anatomy_of(model)
    plasticity = attach_plasticity(gates, PlasticityConfig(**SHORT))
    assert torch.equal(logits(model), before)
    plasticity.detach()
    assert same_anatomy(anatomy_of(model), parts)


@pytest.mark.parametrize("gates_trained", [False, True])
def test_the_weights_of_a_closed_head_do_not_move(gates_trained: bool) -> None:
    plasticity = plasticity_of()
    model = plasticity.base
    plasticity.gates.requires_grad_(gates_trained)
    optimizer = optimizer_of(plasticity)
    for p in model.parameters():  # momentum from before the pruning
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    with torch.no_grad():
        plasticity.gates["heads", 0].fill_(1)
        plasticity.gates["heads", 1].fill_(1)
    optimizer.zero_grad()
    heads = [(layer, head) for layer in (0, 1) for head in range(4)]
    before = {head: head_weights(model, *head) for head in heads}
    train(plasticity, optimizer, steps=3)
    closed = closed_heads(plasticity)
    assert len(closed) == 4
    for head in heads:
        assert same(head_weights(model, *head), before[head]) == (head in closed)


def test_without_restoring_momentum_and_decay_would_move_them() -> None:
    """The test above can fail."""
    plasticity = plasticity_of()
    optimizer = optimizer_of(plasticity)
    plasticity.begin_step()
    head = closed_heads(plasticity)[0]
    before = head_weights(plasticity.base, *head)
    model: Any = plasticity.base
    model(input_ids=ids(4, 0), labels=ids(4, 0)).loss.backward()
    optimizer.step()
    assert not any(torch.equal(head_weights(model, *head)[k], v) for k, v in before.items())


def test_a_shared_kv_head_is_trained_with_the_heads_that_are_open() -> None:
    plasticity = plasticity_of(model_of(num_key_value_heads=1))
    optimizer = optimizer_of(plasticity)
    attention = plasticity.base.model.layers[0].self_attn  # type: ignore[union-attr,index]
    before = attention.k_proj.weight.detach().clone()  # type: ignore[union-attr]
    train(plasticity, optimizer, steps=3)
    assert not torch.equal(attention.k_proj.weight, before)  # type: ignore[union-attr,arg-type]


# --- regrowth -------------------------------------------------------------------------------------


@pytest.mark.parametrize("growth", ["gradient", "entropy_gap", "balanced", "random"])
def test_no_loss_jumps_at_the_moment_of_regrowth(growth: Any) -> None:
    plasticity = plasticity_of(growth=growth)
    optimizer = optimizer_of(plasticity)
    train(plasticity, optimizer, steps=3)
    before = logits(plasticity.base)
    plasticity.begin_step()
    result = plasticity.result()
    assert len(result.regrown) == 2
    assert torch.equal(logits(plasticity.base), before)
    assert result.at("adapted").loss == result.at("regrown").loss
    assert result.at("pruned").loss != result.at("before").loss
    assert [row.open for row in result.rows] == [8, 4, 4, 6]


def test_a_regrown_head_opens_over_the_warmup_from_its_own_weights() -> None:
    plasticity = plasticity_of()
    optimizer = optimizer_of(plasticity)
    before = copy.deepcopy(plasticity.base)
    train(plasticity, optimizer, steps=3)
    plasticity.begin_step()
    key, head = plasticity.regrown[0]
    gate = plasticity.gates["heads", int(key)]
    kept = head_weights(before, int(key), head)
    assert same(head_weights(plasticity.base, int(key), head), kept)
    gates = []
    for step in range(3, 7):
        gates.append(float(gate.detach()[head]))
        train(plasticity, optimizer, steps=step + 1, start=step)
    assert gates == [0, 0.5, 1, 1]
    now = head_weights(plasticity.base, int(key), head)
    assert torch.equal(now["o"], kept["o"]) and not torch.equal(now["q"], kept["q"])
    assert float(plasticity.learned[0].detach().abs().max()) > 0, (
        "what it learns lies beside the base"
    )


def test_a_gate_opens_to_what_it_was_before() -> None:
    model = model_of()
    gates = attach(model)
    with torch.no_grad():
        gates["heads", 0].fill_(0.8)
        gates["heads", 1].fill_(0.8)
    gates.requires_grad_(False)
    plasticity = attach_plasticity(gates, PlasticityConfig(**SHORT))
    plasticity.measure_on(BATCHES, HELD_OUT)
    train(plasticity, optimizer_of(plasticity), steps=7)
    values = torch.cat([gates["heads", 0], gates["heads", 1]]).tolist()
    assert sorted(values) == pytest.approx([0, 0, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8])


def test_heads_that_were_closed_before_can_grow() -> None:
    gates = attach(model_of())
    with torch.no_grad():
        gates["heads", 1][2] = 0
    gates.requires_grad_(False)
    plasticity = attach_plasticity(gates, PlasticityConfig(**{**SHORT, "prune": 0, "regrow": 0.1}))
    plasticity.measure_on(BATCHES, HELD_OUT)
    train(plasticity, optimizer_of(plasticity), steps=7)
    assert plasticity.regrown == [("1", 2)] and gates["heads", 1].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("rate", [1.0, 0.0001])
def test_regrown_heads_have_a_parameter_group_with_their_own_rate(rate: float) -> None:
    plasticity = plasticity_of(rate=rate)
    optimizer = optimizer_of(plasticity)
    groups = optimizer.param_groups
    own = [group for group in groups if group.get("name") == "regrown"]
    assert len(own) == 1 and own[0]["lr"] == pytest.approx(0.01 * rate)
    ours = {id(p) for p in plasticity.learned}
    assert {id(p) for p in own[0]["params"]} == ours and len(ours) == 2
    assert not any(
        id(p) in ours for group in groups if group is not own[0] for p in group["params"]
    )
    plasticity.own_group(optimizer, 0.01)
    assert len(optimizer.param_groups) == len(groups), "only once"
    train(plasticity, optimizer, steps=7)
    largest = max(float(p.detach().abs().max()) for p in plasticity.learned)
    assert (largest > 1e-3) == (rate == 1.0) and largest > 0


def test_a_second_cycle_prunes_to_the_same_share_and_uses_a_heads_parameter_again() -> None:
    plasticity = plasticity_of(cycles=2, adapt=2, learn=2)
    optimizer = optimizer_of(plasticity)
    train(plasticity, optimizer, steps=8)
    plasticity.begin_step()
    result = plasticity.result()
    assert [row.phase for row in result.rows] == [
        *("before", "pruned", "adapted", "regrown", "learned"),
        *("pruned", "adapted", "regrown", "learned"),
    ]
    assert [row.open for row in result.rows] == [8, 4, 4, 6, 6, 4, 4, 6, 6]
    assert [row.step for row in result.rows] == [0, 0, 2, 2, 4, 4, 6, 6, 8]
    assert [row.cycle for row in result.rows] == [1, 1, 1, 1, 1, 2, 2, 2, 2]
    slots = [slot for key in plasticity.sites for _, slot in plasticity._states(key).slots()]
    assert len(slots) == len(set(slots)) == len(set(plasticity.regrown))


def test_a_head_without_consent_does_not_grow() -> None:
    plasticity = plasticity_of(growth="random", regrow=0.5)
    agency = attach_agency(plasticity.gates, AgencyConfig())
    optimizer = optimizer_of(plasticity)
    train(plasticity, optimizer, steps=1)
    locked = closed_heads(plasticity)[0]
    agency.set_head_state(*locked, "active", consent=False)
    train(plasticity, optimizer, steps=4, start=1)
    grown = [(int(key), head) for key, head in plasticity.regrown]
    assert len(grown) == 3 and locked not in grown


# --- the end --------------------------------------------------------------------------------------


def test_folding_adds_what_was_learned_to_the_base(tmp_path: Path) -> None:
    plasticity = plasticity_of()
    model = plasticity.base
    train(plasticity, optimizer_of(plasticity), steps=7)
    plasticity.begin_step()
    before = logits(model)
    with pytest.raises(UnsupportedModel, match=r"call fold\(\)"):
        export(model, tmp_path / "early")
    result = plasticity.fold()
    assert torch.allclose(logits(model), before, atol=1e-5)
    assert str(result) == (
        "6 of 8 heads are open after 7 steps, 2 of them regrown (entropy_gap): the held-out loss "
        f"was {result.rows[0].loss:.4f}, {result.rows[1].loss:.4f} after pruning and "
        f"{result.loss:.4f} at the end"
    )
    assert result.cells()[-1] == ["1", "learned", "7", f"{result.loss:.4f}", "6"]
    assert result.as_dict()["rows"][1]["open"] == 4


def test_a_fused_projection_on_the_other_axis() -> None:
    """GPT-2 has queries, keys and values in one matrix, and its weights the other way round."""
    plasticity = plasticity_of(tiny_model("gpt2"), prune=0.5, regrow=0.25)
    model: Any = plasticity.base
    attention = model.transformer.h[0].attn
    before = attention.c_attn.weight.detach().clone()
    optimizer = optimizer_of(plasticity)
    train(plasticity, optimizer, steps=3)
    gate, width = plasticity.gates["heads", 0], attention.head_dim
    for head, value in enumerate(gate.tolist()):
        for part in range(3):
            start = part * attention.embed_dim + head * width
            own = slice(start, start + width)
            assert torch.equal(attention.c_attn.weight[:, own], before[:, own]) == (value == 0)
    train(plasticity, optimizer, steps=7, start=3)
    plasticity.begin_step()
    output = logits(model)
    assert any(float(p.detach().abs().max()) > 0 for p in plasticity.learned)
    plasticity.fold()
    assert torch.allclose(logits(model), output, atol=1e-5)


# --- under the Trainer ----------------------------------------------------------------------------


def test_the_trainer_runs_the_cycle_and_a_resumed_run_ends_exactly_alike(tmp_path: Path) -> None:
    def run(resume: str | None = None, **args: Any) -> Plasticity:
        plasticity = plasticity_of(learn=5, rate=0.5)
        trainer = trainer_of(plasticity, tmp_path, steps=8, **args)
        make_plastic(trainer, plasticity, BATCHES, HELD_OUT)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.optimizer is not None
        rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
        assert rates == pytest.approx([0.01, 0.01, 0.005])
        return plasticity

    whole = run(save_strategy="steps", save_steps=1)
    assert [row.open for row in whole.result().rows] == [8, 4, 4, 6, 6]
    for step in (2, 3, 4):  # before, at and after regrowth
        again = run(resume=str(tmp_path / f"checkpoint-{step}"))
        assert again.result() == whole.result()
        assert torch.equal(logits(again.base), logits(whole.base))


def test_the_same_run_without_regrowth_is_its_control() -> None:
    def result(seed: int, **config: Any) -> Any:
        plasticity = plasticity_of(growth="random", seed=seed, score="random", **config)
        train(plasticity, optimizer_of(plasticity), steps=7)
        plasticity.begin_step()
        return plasticity.result()

    regrown, without = ([result(s, regrow=share) for s in (0, 1)] for share in (0.25, 0.0))
    assert [row.phase for row in without[0].rows] == ["before", "pruned", "adapted", "learned"]
    assert without[0].regrown == () and without[0].rows[1] == regrown[0].rows[1]
    comparison = compare_regrowth(regrown, without)
    differences = [a.loss - b.loss for a, b in zip(regrown, without, strict=True)]
    assert comparison.difference.value == pytest.approx(sum(differences) / 2)
    assert comparison.is_better == all(d < 0 for d in differences)
    assert ("is better" in str(comparison)) == comparison.is_better
    assert "random; 6 heads open) and" in str(comparison) and "without (4)" in str(comparison)
    single = compare_regrowth(regrown[:1], without[:1])
    assert not single.is_better and "is not shown to be better" in str(single)
    with pytest.raises(InvalidInput, match="2 results and 1 controls"):
        compare_regrowth(regrown, without[:1])


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [{"prune": 1.0}, {"prune": "half"}, {"regrow": -0.1}, {"growth": "weeds"}, {"rate": 0}]
    + [{"score": "block_influence"}, {"adapt": 0}, {"warmup": 5}, {"seed": -1}, {"cycles": 1.5}],
)
def test_a_setting_that_means_nothing_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(config)) + " = "):
        PlasticityConfig(**{**SHORT, **config})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prune": 0.01, "regrow": 0}, "closes none of 8 heads"),
        ({"prune": 0.95}, "closes all 8 heads"),
        ({"regrow": 0.01}, "opens 0 of 8 heads, and 4 are closed"),
        ({"regrow": 0.7}, "opens 6 of 8 heads, and 4 are closed"),
    ],
)
def test_shares_that_do_not_fit_the_model_are_refused(config: Any, message: str) -> None:
    model = model_of()
    gates, before = attach(model), logits(model)
    with pytest.raises(InvalidInput, match=message):
        attach_plasticity(gates, PlasticityConfig(**{**SHORT, **config}))
    assert torch.equal(logits(model), before) and gates["heads", 0].tolist() == [1, 1, 1, 1]


def test_gates_on_no_heads_and_compensated_heads_are_refused() -> None:
    with pytest.raises(AdapterError, match="needs gates on heads"):
        attach_plasticity(attach(model_of(), GateConfig(("layers",))))
    pruned = prune(model_of(), BATCHES, PruneConfig(heads=0.5))
    with pytest.raises(AdapterError, match="compensation has output weights of its own for heads"):
        attach_plasticity(pruned.gates, PlasticityConfig(**SHORT))


def test_a_trainer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    plasticity = plasticity_of()
    with pytest.raises(InvalidInput, match="max_steps = 6: the cycle takes 7 steps"):
        make_plastic(trainer_of(plasticity, tmp_path, steps=6), plasticity, BATCHES, HELD_OUT)
    with pytest.raises(InvalidInput, match="another model"):
        trainer = trainer_of(plasticity_of(), tmp_path)
        make_plastic(trainer, plasticity, BATCHES, HELD_OUT)
    with pytest.raises(InvalidInput, match="no held-out text"):
        make_plastic(trainer_of(plasticity, tmp_path), plasticity, BATCHES, [])


def test_what_was_not_measured_or_trained_is_named() -> None:
    plasticity = attach_plasticity(attach(model_of()), PlasticityConfig(**SHORT))
    with pytest.raises(InvalidInput, match="nothing to measure on"):
        plasticity.begin_step()
    with pytest.raises(InvalidInput, match="has not begun"):
        plasticity.result()
    plasticity.gates.add_pattern("other")
    plasticity.measure_on(BATCHES, HELD_OUT)
    plasticity.gates.use("other")
    with pytest.raises(AdapterError, match=r"call gates.use\('default'\)"):
        plasticity.begin_step()
