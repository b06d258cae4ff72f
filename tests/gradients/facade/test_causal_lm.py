"""CGGRModel: the seed's call, the loss of some tokens, scores where the router predicts."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.anatomy.tiny import tiny_model
from pliant.errors import InvalidInput
from pliant.gradients.cautions import BiasedWarning
from pliant.gradients.facade.causal_lm import CGGRModel
from pliant.gradients.facade.scorer import create_truncated_router

IDS = torch.randint(5, 100, (3, 12), generator=torch.Generator().manual_seed(0))


def wrapped(model: nn.Module, **settings: Any) -> CGGRModel:
    plain = {"warmup_steps": 0, "dynamic_threshold": False, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BiasedWarning)
        return CGGRModel(model, **plain)


def losses(model: Any, labels: Tensor = IDS) -> Tensor:
    """(B, T - 1), of every token."""
    logits = model(input_ids=IDS).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")


def test_the_loss_is_that_of_the_hardest() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        expected = losses(model).topk(3, dim=-1).values.mean()
    loss = wrapped(model, scoring="loss")(IDS, labels=IDS)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert all(p.grad is not None for p in model.parameters())


class Oracle(nn.Module):
    """Finds one position of each row hard: that which predicts the token after it."""

    def __init__(self, hard_at: int) -> None:
        super().__init__()
        self.hard_at = hard_at

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        said = input_ids.roll(-1, dims=1)
        said[:, self.hard_at] += 1
        return F.one_hot(said, 128).float() * 20


@pytest.mark.parametrize("hard_at", [0, 5, 10])
def test_with_a_router_scores_are_the_routers_and_shifted(hard_at: int) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        expected = losses(model)[:, hard_at].mean()
    found = wrapped(model, router=Oracle(hard_at), min_tokens_ratio=0.08)(IDS, labels=IDS)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("type_", ["llama", "gpt2", "bloom", "mamba"])
def test_a_truncated_router_of_the_model_itself(type_: str) -> None:
    """It runs inside the model's own patched forward, and only scores."""
    model = tiny_model(type_)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    router = create_truncated_router(model, num_layers=1)
    with torch.no_grad():
        shallow = F.cross_entropy(router(IDS)[:, :-1].transpose(1, 2), IDS[:, 1:], reduction="none")
        chosen = losses(model).gather(1, shallow.topk(3, dim=-1).indices)
    with warnings.catch_warnings():
        # Where "sparse" is not exact, "exact" computes, and says so.
        warnings.simplefilter("ignore")
        cggr = wrapped(model, router=router, scoring="loss")
        found = cggr(IDS, labels=IDS)
        found.backward()
    torch.testing.assert_close(found, chosen.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_curriculum_starts_with_the_whole_loss_and_falls_by_itself(dynamic: bool) -> None:
    model = tiny_model("llama")
    whole = model(input_ids=IDS, labels=IDS).loss
    cggr = wrapped(model, warmup_steps=4, dynamic_threshold=dynamic)
    counts = []
    for _ in range(6):
        loss = cggr(IDS, labels=IDS)
        counts.append(cggr.get_metrics()["tokens_selected"])
        assert torch.allclose(loss, whole) == (counts[-1] == 33)
    # The model is sure of nothing, so that a dynamic threshold keeps more.
    falling = [33, 27, 21, 15, 15] if dynamic else [27, 21, 15, 9, 9]
    assert counts == [33, *falling]
    by_hand = wrapped(tiny_model("llama"), warmup_steps=4)
    for _ in range(2):
        by_hand.step()
    for _ in range(2):
        by_hand(IDS, labels=IDS)
        assert by_hand.get_metrics()["tokens_selected"] == 3 * 7


def test_metrics_are_the_published_packages_and_more() -> None:
    cggr = wrapped(tiny_model("llama"))
    assert cggr.get_metrics() == {}
    cggr(IDS, labels=IDS)
    told = cggr.get_metrics()
    assert {
        "step",
        "token_ratio",
        "tokens_selected",
        "tokens_total",
        "avg_confidence",
        "avg_entropy",
    } < set(told)
    assert (told["step"], told["tokens_selected"], told["tokens_total"]) == (0, 9, 33)
    assert told["token_ratio"] == pytest.approx(9 / 33)
    assert 0 < told["avg_confidence"] < 1 < told["avg_entropy"] < 6
    assert json.dumps(told)


def test_metrics_cost_nothing_until_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from pliant.gradients.facade import causal_lm

    cggr, looked = wrapped(tiny_model("llama")), []
    measured = causal_lm.measured
    monkeypatch.setattr(causal_lm, "measured", lambda *args: looked.append(1) or measured(*args))
    for _ in range(3):
        cggr(IDS, labels=IDS).backward()
    assert not looked
    cggr.step()
    assert cggr.get_metrics()["step"] == 2 and looked == [1]


def test_it_is_ready_to_train_and_evaluates_all_tokens() -> None:
    model = tiny_model("llama")
    whole = model(input_ids=IDS, labels=IDS).loss
    assert not model.training
    cggr = wrapped(model)
    assert model.training
    with torch.no_grad():
        torch.testing.assert_close(cggr(IDS, labels=IDS), whole)
    torch.testing.assert_close(cggr.eval()(IDS, labels=IDS), whole)
    assert cggr.get_metrics() == {}
    assert cggr(IDS).logits.shape == (3, 12, model.config.vocab_size)


def test_nothing_is_added_to_the_models_state() -> None:
    model = tiny_model("llama")
    plain = list(model.state_dict())
    cggr = wrapped(model, router=create_truncated_router(model, num_layers=1), warmup_steps=8)
    assert set(cggr.state_dict()) == {*(f"model.{name}" for name in plain), "_extra_state"}
    assert len(list(cggr.parameters())) == len(list(model.parameters()))
    cggr(IDS, labels=IDS)
    again = tiny_model("llama")
    other = wrapped(again, router=create_truncated_router(again, num_layers=1), warmup_steps=8)
    other.load_state_dict(copy.deepcopy(cggr.state_dict()))
    torch.testing.assert_close(other(IDS, labels=IDS), cggr(IDS, labels=IDS))
    assert other.get_metrics()["step"] == 1
    cggr.gradients.detach()
    assert "forward" not in vars(model) and list(model.state_dict()) == plain


def test_a_router_with_weights_of_its_own_goes_along() -> None:
    own = tiny_model("gpt2")
    cggr = wrapped(tiny_model("llama"), router=own)
    cggr.to(torch.float64)
    assert own.dtype == torch.float64
    cggr(IDS, labels=IDS).backward()
    assert all(p.grad is None for p in own.parameters()), "it scores, and is not trained"


def test_a_mask_and_nothing_to_learn() -> None:
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    cggr = wrapped(tiny_model("llama"))
    labels = IDS.masked_fill(mask == 0, -100)
    cggr(IDS, labels=labels, attention_mask=mask)
    assert cggr.get_metrics()["tokens_total"] == 6 + 11 + 11 + 1
    loss = cggr(IDS, labels=torch.full_like(IDS, -100))
    loss.backward()
    assert loss.item() == 0


def test_the_default_is_the_seeds_and_is_warned_of() -> None:
    with pytest.warns(BiasedWarning, match="far behind") as told:
        cggr = CGGRModel(tiny_model("llama"))
    assert told[0].filename == __file__
    config = cggr.gradients.config
    assert (config.ratio, config.warmup_steps, config.dynamic, config.sensitivity) == (
        0.25,
        1000,
        True,
        0.5,
    )
    assert (config.selection, config.score, config.engine) == ("topk", "combined", "sparse")
    with pytest.raises(InvalidInput, match="engine = 'dense'"):
        wrapped(tiny_model("llama"), engine="dense")
