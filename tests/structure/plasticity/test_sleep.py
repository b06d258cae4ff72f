"""Sleep merges heads that write the same, drops those that write nothing, and can be undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tests.minimal_adapter import logits
from tests.structure.plasticity.models import (
    BATCHES,
    HELD_OUT,
    model_of,
    optimizer_of,
    plasticity_of,
    train,
)
from torch.nn import functional as F

from pliant.adapters import attached
from pliant.anatomy import Anatomy
from pliant.errors import AdapterError, InvalidInput
from pliant.structure import (
    PlasticityConfig,
    PruneConfig,
    SleepConfig,
    attach,
    attach_agency,
    prune,
    sleep,
)
from pliant.structure.gates import Gates
from pliant.structure.plasticity.sleep import products

WAYS: tuple[Literal["weights", "gate"], ...] = ("weights", "gate")


def attention(model: Any, layer: int) -> tuple[Any, int]:
    own: Any = Anatomy.of(model).layers[layer].self_attn
    return own, own.head_dim


@torch.no_grad()
def make_equal(model: Any, layer: int, a: int, b: int, scale: float = 1.0) -> None:
    """Head b gets the weights of head a, its output times `scale`."""
    own, width = attention(model, layer)
    from_, to = slice(a * width, (a + 1) * width), slice(b * width, (b + 1) * width)
    for projection in (own.q_proj, own.k_proj, own.v_proj):
        projection.weight[to] = projection.weight[from_]
    own.o_proj.weight[:, to] = own.o_proj.weight[:, from_] * scale


def asleep(model: Any, **config: Any) -> tuple[Gates, Any]:
    gates = attach(model)
    return gates, sleep(gates, BATCHES, HELD_OUT, SleepConfig(**{"negligible": 0.0, **config}))


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("take_over", WAYS)
def test_two_equal_heads_become_one_and_the_output_stays(take_over: Any, scale: float) -> None:
    model = model_of()
    make_equal(model, 1, 0, 2, scale)
    before = logits(model)
    gates, result = asleep(model, take_over=take_over)
    (merger,) = result.merged
    assert (merger.site, {merger.closed, merger.into}) == ("1", {0, 2})
    assert merger.cosine == pytest.approx(1, abs=1e-5)
    if scale < 1:
        assert merger.closed == 2, "the larger one remains"
    assert gates["heads", 1][merger.closed] == 0
    assert float((logits(model) - before).abs().max()) < 1e-5
    assert result.after == pytest.approx(result.before, abs=1e-6)
    assert "1 were merged into others and 0 dropped" in str(result)
    assert ("compensation" in attached(model)) == (take_over == "weights")
    result.undo()
    assert torch.equal(logits(model), before)


def test_three_equal_heads_become_one() -> None:
    model = model_of()
    make_equal(model, 0, 0, 1)
    make_equal(model, 0, 0, 3)
    before = logits(model)
    gates, result = asleep(model, take_over="gate")
    assert len(result.merged) == 2 and sorted(gates["heads", 0].tolist())[:3] == [0, 0, 1]
    assert float((logits(model) - before).abs().max()) < 1e-5


def test_heads_with_equal_output_weights_alone_are_not_alike() -> None:
    model = model_of()
    own, width = attention(model, 1)
    with torch.no_grad():
        own.o_proj.weight[:, :width] = own.o_proj.weight[:, width : 2 * width]
    _, result = asleep(model)
    assert result.merged == () and result.dropped == () and 0 < result.largest_cosine < 0.85
    assert "nothing was changed" in str(result) and result.before == result.after
    assert list(attached(model)) == ["structure"]


@pytest.mark.parametrize("take_over", WAYS)
def test_a_head_that_writes_next_to_nothing_is_dropped(take_over: Any) -> None:
    model = model_of()
    own, width = attention(model, 0)
    with torch.no_grad():
        own.o_proj.weight[:, width : 2 * width] *= 1e-3
    before = logits(model)
    gates, result = asleep(model, negligible=0.1, take_over=take_over)
    assert result.dropped == (("0", 1),) and gates["heads", 0].tolist() == [1, 0, 1, 1]
    assert float((logits(model) - before).abs().max()) < 0.02
    assert result.as_dict()["dropped"] == [["0", 1]]


def test_closed_heads_and_padding_do_not_count() -> None:
    model = model_of()
    make_equal(model, 1, 0, 2)
    gates = attach(model)
    with torch.no_grad():
        gates["heads", 1][0] = 0
    assert sleep(gates, BATCHES, HELD_OUT, SleepConfig(negligible=0)).merged == ()
    whole = sleep(gates, BATCHES, HELD_OUT).largest_cosine
    padded = dict(BATCHES[0], input_ids=F.pad(BATCHES[0]["input_ids"], (0, 5)))
    padded["attention_mask"] = F.pad(torch.ones_like(BATCHES[0]["input_ids"]), (0, 5))
    assert sleep(gates, [padded], HELD_OUT).largest_cosine == pytest.approx(whole, abs=1e-5)


def test_the_inner_products_are_those_of_what_heads_write() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 6, generator=generator)
    x = torch.randn(7, 6, generator=generator)
    written = [x[:, h * 2 : h * 2 + 2] @ weight[:, h * 2 : h * 2 + 2].T for h in range(3)]
    expected = torch.tensor([[float((a * b).sum()) for b in written] for a in written])
    assert torch.allclose(products(weight, x.T @ x, 2).float(), expected, rtol=1e-4)


@pytest.mark.parametrize(
    "config", [{"similarity": 0}, {"negligible": 1}, {"take_over": "luck"}, {"damping": 0}]
)
def test_settings_that_mean_nothing_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(config)) + " = "):
        SleepConfig(**config)


def test_no_text_and_compensated_heads_are_refused(tmp_path: Path) -> None:
    gates = attach(model_of())
    with pytest.raises(InvalidInput, match="no calibration text"):
        sleep(gates, [], HELD_OUT)
    pruned = prune(model_of(), BATCHES, PruneConfig(heads=0.5))
    with pytest.raises(AdapterError, match="output weights of its own"):
        sleep(pruned.gates, BATCHES, HELD_OUT)


# --- inside a cycle ------------------------------------------------------------------------------


def test_a_cycle_merges_heads_before_it_prunes(tmp_path: Path) -> None:
    model = model_of()
    make_equal(model, 1, 0, 2, 0.5)
    plasticity = plasticity_of(model, sleep=0.99)
    optimizer = optimizer_of(plasticity)
    plasticity.begin_step()
    result = plasticity.result()
    assert [row.phase for row in result.rows] == ["before", "slept", "pruned"]
    assert result.merged == (("1", 2, 0),)
    before, slept, pruned = (row for row in result.rows)
    assert (before.open, slept.open, pruned.open) == (8, 7, 4)  # it counts among those to close
    assert slept.loss == pytest.approx(before.loss, abs=1e-5) and pruned.loss != slept.loss
    plasticity.save_pretrained(tmp_path)
    plasticity.restore(tmp_path)
    assert plasticity.result() == result
    train(plasticity, optimizer, steps=7)
    plasticity.begin_step()
    assert "1 were merged into others" in str(plasticity.result())


def test_a_cycle_merges_no_locked_heads_and_sleeps_only_if_asked() -> None:
    for config, merged in (({"sleep": 0.99}, 0), ({}, 0)):
        model = model_of()
        make_equal(model, 1, 0, 2)
        plasticity = plasticity_of(model, **config)
        if config:
            agency = attach_agency(plasticity.gates)
            agency.set_head_state(1, 0, "active", consent=False)
        plasticity.begin_step()
        assert len(plasticity.result().merged) == merged


@pytest.mark.parametrize("value", [-0.1, 1.5, True])
def test_a_sleep_that_is_no_cosine_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInput, match="sleep = "):
        PlasticityConfig(sleep=value)
