"""A controller closes the gates that a model needs least, exactly as many as its budget says."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.minimal_adapter import logits, tiny_llama
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.adapters import attached
from pliant.anatomy import Anatomy
from pliant.errors import AdapterError, InvalidInput
from pliant.structure.config import GateConfig
from pliant.structure.controller import Controller, ControllerConfig, Method
from pliant.structure.gates import Gates, attach

METHODS: tuple[Method, ...] = ("hard_concrete", "straight_through", "heuristic")
IDS = torch.randint(0, 60, (8, 16), generator=torch.Generator().manual_seed(3))
USELESS = ((0, 1), (1, 2))


def model_of(kv_heads: int = 4) -> Any:
    """Two layers of four heads, each of which matters."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": kv_heads}
    return tiny_llama(**sizes, initializer_range=0.5).requires_grad_(False)


def weights_of(model: nn.Module, layer: int, head: int) -> Tensor:
    """The head's slice of W_o."""
    attention = Anatomy.of(model).attention(layer)
    assert attention is not None
    weight: Any = attention.output.weight
    return weight[:, head * attention.head_dim : (head + 1) * attention.head_dim]


def predictions(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits.log_softmax(dim=-1)


def train(
    model: nn.Module, controller: Controller, expected: Tensor, steps: int, start: int = 0
) -> None:
    optimizer = torch.optim.Adam([controller.logits], lr=0.1)
    for _ in range(start, steps):
        loss = F.kl_div(predictions(model), expected, log_target=True, reduction="batchmean") / 16
        (loss + controller.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()


def zeroed(weights: Tensor) -> None:
    weights.zero_()


def replaced_by_noise(weights: Tensor) -> None:
    weights.normal_(generator=torch.Generator().manual_seed(0))


# --- what it closes ------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [zeroed, replaced_by_noise], ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_the_heads_that_are_useless_by_construction_close(
    method: Method, spoil: Callable[[Tensor], None]
) -> None:
    model = model_of()
    for unit in USELESS:
        zeroed(weights_of(model, *unit))
    expected = predictions(model)
    for unit in USELESS:
        spoil(weights_of(model, *unit))
    gates = attach(model)
    controller = Controller(gates, ControllerConfig(budget=0.25, method=method))
    model.train()
    train(model, controller, expected, steps=120)
    rounding = controller.finalize()
    assert rounding.units == tuple(("heads", layer, 0, head) for layer, head in USELESS)
    assert rounding.already_closed == 2  # by training, not by the rounding
    assert str(rounding) == "Closed 2 of 8 heads; training had closed 2 of them."
    assert torch.allclose(predictions(model), expected, atol=1e-5)


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(("budget", "heads", "channels"), [(0.25, 2, 16), (0.5, 4, 32)])
def test_the_budget_is_met_exactly_by_each_kind(
    budget: float, heads: int, channels: int, uniform: bool
) -> None:
    gates = attach(model_of(), GateConfig(("heads", "channels")))
    controller = Controller(gates, ControllerConfig(budget=budget, uniform=uniform))
    with torch.no_grad():  # layer 1 would lose everything
        controller.logits.copy_(torch.arange(len(controller.logits), 0, -1))
    rounding = controller.finalize()
    assert rounding.closed == {"heads": heads, "channels": channels}
    assert rounding.gates == {"heads": 8, "channels": 64}
    values = {kind: [gates[kind, layer] for layer in (0, 1)] for kind in ("heads", "channels")}
    assert all(set(v.unique().tolist()) <= {0.0, 1.0} for own in values.values() for v in own)
    closed = [int((v == 0).sum()) for v in values["heads"]]
    assert closed == ([heads // 2, heads // 2] if uniform else [0, heads])
    assert len(rounding.as_dict()["units"]) == heads + channels


def test_heads_that_share_a_kv_head_close_together() -> None:
    gates = attach(model_of(kv_heads=2))
    controller = Controller(gates, ControllerConfig(budget=0.5, kv_groups=True))
    assert len(controller.logits) == 4
    with torch.no_grad():
        controller["heads", 0][1] = -5
        controller["heads", 1][0] = -5
    assert controller.finalize().closed == {"heads": 4}
    assert gates["heads", 0].tolist() == [1, 1, 0, 0]
    assert gates["heads", 1].tolist() == [0, 0, 1, 1]


# --- while it is attached ------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_open_gates_change_no_bit(method: Method) -> None:
    model = model_of()
    before = logits(model)
    gates = attach(model, GateConfig(("heads", "channels", "layers")))
    Controller(gates, ControllerConfig(method=method, budget=0.5))
    assert torch.equal(logits(model), before) == (method != "heuristic")


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_and_the_penalty_reach_every_logit(method: Method) -> None:
    model = model_of()
    controller = Controller(attach(model), ControllerConfig(method=method))
    assert any(p is controller.logits for p in model.parameters())  # the Trainer's optimizer has it
    model.train()
    with torch.no_grad():
        controller.logits.zero_()  # at the ends, the clamp of hard_concrete has no slope
    predictions(model)[..., 0].sum().backward()
    assert controller.logits.grad is not None
    assert controller.logits.grad.count_nonzero() >= (5 if method == "hard_concrete" else 8)
    assert controller.penalty().item() == 0
    with torch.no_grad():
        controller.logits.fill_(-3)
    controller.step()
    (gradient,) = torch.autograd.grad(controller.penalty(), controller.logits)
    assert (gradient < 0).all()  # fewer are open than the budget allows


def test_the_penalty_grows_while_too_many_gates_are_open() -> None:
    controller = Controller(attach(model_of()), ControllerConfig(ramp=4))
    penalties = []
    for _ in range(6):
        penalties.append(controller.penalty().item())
        controller.step()
    assert all(a < b for a, b in zip(penalties[1:], penalties[2:], strict=False))
    (gradient,) = torch.autograd.grad(controller.penalty(), controller.logits)
    assert (gradient > 0).all()


def test_noise_stays_for_a_step_and_is_absent_in_eval_mode() -> None:
    model = model_of()
    controller = Controller(attach(model), ControllerConfig(seed=1))
    with torch.no_grad():
        controller.logits.zero_()
    still = logits(model)
    model.train()
    noisy = logits(model)
    assert torch.equal(logits(model), noisy)
    controller.step()
    assert not torch.equal(logits(model), noisy)
    model.eval()
    assert torch.equal(logits(model), still)


def test_the_gates_own_values_wait() -> None:
    model = model_of()
    gates = attach(model, GateConfig(patterns=("default", "other")))
    with torch.no_grad():
        gates["heads", 0][0] = 0.5
    before, values = logits(model), copy.deepcopy(gates.state_dict())
    controller = Controller(gates)
    with torch.no_grad():
        controller["heads", 0][1] = -9
    assert not torch.equal(logits(model), before)
    with controller.disabled():
        assert torch.equal(logits(model), before)
    controlled = logits(model)
    gates.use("other")  # nobody controls it
    assert not torch.equal(logits(model), controlled)
    gates.use("default")
    controller.detach()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(gates.state_dict()[k], v) for k, v in values.items())
    assert attached(model) == {"structure": gates}


def test_a_copy_of_the_model_has_a_controller_of_its_own() -> None:
    model = model_of()
    Controller(attach(model))
    copied = copy.deepcopy(model)
    expected = logits(copied)
    with torch.no_grad():
        attached(model)["controller"].logits.fill_(-9)
    assert torch.equal(logits(copied), expected)
    copied_controller: Any = attached(copied)["controller"]
    with torch.no_grad():
        copied_controller.logits.fill_(-9)
    assert torch.equal(logits(copied), logits(model))
    assert copied_controller.gates is attached(copied)["structure"]


def test_a_compiled_model_sees_what_was_trained() -> None:
    model = model_of()
    controller = Controller(attach(model))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for start in (3.0, 0.0):
        with torch.no_grad():
            controller.logits.fill_(start)
            output = compiled(input_ids=IDS, use_cache=False).logits.log_softmax(dim=-1)
            assert torch.allclose(output, predictions(model), atol=1e-4)
    torch.compiler.reset()


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path: Path) -> None:
    def start() -> tuple[Any, Gates]:
        model = model_of().train()
        return model, attach(model)

    model, gates = start()
    expected = predictions(model).detach().roll(1, dims=-1)
    controller = Controller(gates, ControllerConfig(ramp=5))
    train(model, controller, expected, steps=6)
    controller.save_pretrained(tmp_path)
    train(model, controller, expected, steps=3)
    other, _ = start()
    resumed = Controller.from_pretrained(other, tmp_path)
    train(other, resumed, expected, steps=3)
    assert int(resumed.steps) == 9
    assert torch.equal(resumed.logits, controller.logits)
    assert resumed.finalize() == controller.finalize()


# --- the heuristic's rules -----------------------------------------------------------------------


def heuristic(every: int = 100) -> tuple[Any, Controller]:
    model = model_of()
    return model, Controller(attach(model), ControllerConfig(method="heuristic", every=every))


def changes(controller: Controller, steps: int) -> tuple[Any, Tensor]:
    """The decision of the last step, and what it added to the logits."""
    before = controller.logits.detach().clone()
    decisions = [controller.step() for _ in range(steps)]
    assert decisions[:-1] == [None] * (steps - 1)
    return decisions[-1], controller.logits.detach() - before


def test_a_high_entropy_lowers_a_logit() -> None:
    _, controller = heuristic()
    controller.observe(entropy={("heads", 1): torch.tensor([1.4, 1.6, math.log(7), 0.0])})
    decision, change = changes(controller, 100)
    assert (decision.high_entropy, decision.low_gradient, decision.regrown) == (2, 0, 0)
    assert torch.allclose(change, torch.tensor([0, 0, 0, 0, 0, -0.1, -0.1, 0]), atol=1e-6)


def test_a_low_gradient_lowers_a_logit() -> None:
    model, controller = heuristic(every=1)
    zeroed(weights_of(model, 1, 2))
    predictions(model)[..., 0].sum().backward()
    decision, change = changes(controller, 1)
    assert (decision.high_entropy, decision.low_gradient, decision.regrown) == (0, 1, 0)
    assert torch.allclose(change, torch.tensor([0, 0, 0, 0, 0, 0, -0.05, 0]), atol=1e-6)
    assert changes(controller, 1)[0].low_gradient == 0  # nothing was measured since


@pytest.mark.parametrize("measured", [False, True])
def test_an_important_closed_gate_regrows(measured: bool) -> None:
    model, controller = heuristic(every=1)
    with torch.no_grad():
        controller.logits[:] = torch.tensor([3.0, 3, 3, -4, 3, 3, 3, -4])
    if measured:
        importance = torch.tensor([0.9, 0.9, 0.9, 0.8])
        controller.observe(importance={("heads", 0): importance, ("heads", 1): importance - 0.2})
    else:  # the loss is what the gate of head 3 of layer 1 adds
        contribution = weights_of(model, 1, 3)
        contribution.mul_(100)
        predictions(model)[..., 0].sum().backward()
    decision, change = changes(controller, 1)
    assert decision.regrown == 1
    assert change[3 if measured else 7].item() == pytest.approx(1)
    assert "regrown: 1" in str(decision)


def test_a_closed_gate_is_not_lowered_further() -> None:
    _, controller = heuristic(every=1)
    with torch.no_grad():
        controller["heads", 0].fill_(-2)
    controller.observe(entropy={("heads", 0): torch.full((4,), 9.0)})
    assert changes(controller, 1)[0].high_entropy == 0


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"budget": 0.0}, {"budget": 1}, {"budget": math.nan}, {"method": "l0"}, {"rate": 0.0}]
    + [{"ramp": -1}, {"every": 0}, {"seed": 1.5}],
)
def test_a_setting_that_means_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(options)) + " = "):
        ControllerConfig(**options)


@pytest.mark.parametrize(("budget", "closed"), [(0.05, 0), (0.95, 8)])
def test_a_budget_that_closes_nothing_or_all_is_refused(budget: float, closed: int) -> None:
    model = model_of()
    gates, before = attach(model), logits(model)
    with pytest.raises(InvalidInput, match=f"closes {closed} of 8 heads"):
        Controller(gates, ControllerConfig(budget=budget))
    assert torch.equal(logits(model), before)


def test_a_second_controller_is_refused() -> None:
    gates = attach(model_of())
    controller = Controller(gates)
    with pytest.raises(AdapterError):
        Controller(gates)
    controller.detach()
    Controller(gates)


def test_loading_needs_gates(tmp_path: Path) -> None:
    Controller(attach(model_of())).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="needs gates to control, and Llama"):
        Controller.from_pretrained(model_of(), tmp_path)


def test_what_is_not_controlled_is_named() -> None:
    controller = Controller(attach(model_of()))
    with pytest.raises(InvalidInput, match="channels are not gated; there are heads"):
        controller["channels", 0]
    with pytest.raises(InvalidInput, match="layer 7 has no heads"):
        controller["heads", 7]
    with pytest.raises(InvalidInput, match=r"shape \[3\], and there are 4 gates"):
        controller.observe(entropy={("heads", 0): torch.zeros(3)})
    with pytest.raises(InvalidInput, match="no pattern 'fine'"):
        Controller(controller.gates, ControllerConfig(pattern="fine"))
