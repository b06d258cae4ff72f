"""CGGRModel: the seed's call, the loss of some tokens, scores where the router predicts."""

from __future__ import annotations

import copy
import json
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForTokenClassification

from pliant.anatomy.tiny import tiny_model
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.gradients.cautions import BiasedWarning
from pliant.gradients.facade.causal_lm import CGGRModel
from pliant.gradients.facade.loss import CGGRLoss
from pliant.gradients.facade.scorer import CGGRScorer, RouterWarning, create_truncated_router
from pliant.gradients.model import GradientsWarning
from pliant.gradients.selection.scores import measured

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


class Recurrent(nn.Module):
    """A language model of no architecture that Pliant knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 16)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 100)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.gru(self.embed(tokens))[0])
        return logits


@pytest.mark.parametrize("with_router", [False, True])
def test_another_architecture_passes_through(with_router: bool) -> None:
    """The model is run whole, and the loss is that of the chosen tokens."""
    model, router = Recurrent(), Recurrent() if with_router else None
    with pytest.warns(GradientsWarning, match=r"Recurrent has no stack of .*runs the whole model"):
        cggr = wrapped(model, router=router)
    loss = cggr(IDS, labels=IDS)
    losses = F.cross_entropy(model(IDS)[:, :-1].transpose(1, 2), IDS[:, 1:], reduction="none")
    scored = (router or model)(IDS)[:, :-1]
    scores, _, _ = measured(scored.flatten(0, 1), IDS[:, 1:].flatten(), "combined")
    hardest = scores.view(3, 11).topk(3, dim=1).indices
    torch.testing.assert_close(loss, losses.gather(1, hardest).mean())
    loss.backward()
    assert model.head.weight.grad is not None
    assert router is None or router.head.weight.grad is None, "it scores, and is not trained"
    metrics = cggr.get_metrics()
    assert (metrics["tokens_selected"], metrics["tokens_total"]) == (9, 33)
    torch.testing.assert_close(cggr.eval()(IDS, labels=IDS), losses.mean())
    assert torch.equal(cggr(IDS), model(IDS)), "without labels, the model's own output"
    with pytest.raises(UnsupportedModel, match="nothing is attached"):
        _ = cggr.gradients


def test_a_router_of_another_architecture_is_the_model_itself() -> None:
    model = Recurrent()
    with pytest.warns(RouterWarning, match="the router is the whole Recurrent"):
        router = create_truncated_router(model, num_layers=4)
    assert torch.equal(router(IDS), model(IDS))
    _, mask, _ = CGGRScorer(router, min_tokens_ratio=0.5, warmup_steps=0)(IDS)
    assert mask.shape == IDS.shape
    with pytest.warns(GradientsWarning):
        cggr, plain = wrapped(model, router=router), wrapped(model)
    calls: list[Any] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(cggr(IDS, labels=IDS), plain(IDS, labels=IDS))
    assert len(calls) == 2, "its own logits are the router's"


def test_another_architecture_has_the_curriculum_and_its_state() -> None:
    with pytest.warns(GradientsWarning):
        cggr, again = (wrapped(Recurrent(), warmup_steps=4) for _ in range(2))
    for _ in range(2):
        cggr(IDS, labels=IDS)
        cggr.step()
    again.load_state_dict(cggr.state_dict())
    assert int(again.step_count) == int(cggr.step_count) == 2
    again(IDS, labels=IDS)
    assert again.get_metrics()["token_ratio"] == 1 - 0.5 * 0.75


def test_metrics_where_every_token_was_trained() -> None:
    """The loss of a classifier of tokens is none of next tokens, so nothing can be selected."""
    config = tiny_model("llama").config
    config.classifier_dropout = 0.0
    cggr = wrapped(LlamaForTokenClassification(config))
    with pytest.warns(GradientsWarning, match="nothing is selected"):
        cggr(IDS, labels=(IDS % 2).masked_fill(IDS > 90, -100))
    metrics = cggr.get_metrics()
    assert metrics["tokens_selected"] == metrics["tokens_total"] == int((IDS <= 90).sum())
    assert metrics["token_ratio"] == 1.0 and 0.5 <= metrics["avg_confidence"] <= 1


def test_its_steps_can_be_read_and_set() -> None:
    """As the published package's buffer: a resumed loop sets it, and goes on from there."""
    cggr = wrapped(tiny_model("llama"), warmup_steps=10)
    cggr(IDS, labels=IDS)
    cggr.step_count.fill_(5)
    cggr(IDS, labels=IDS)
    assert cggr.get_metrics()["step"] == 5
    cggr.step()
    assert cggr.step_count.item() == 6
    assert not any("step_count" in name for name in cggr.state_dict())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"min_tokens_ratio": 2}, "^min_tokens_ratio = 2: give a share"),
        ({"scoring": "excess"}, "^scoring = 'excess': give one of"),
        ({"dynamic_threshold": 3}, "^dynamic_threshold = 3"),
        ({"threshold_sensitivity": -1}, "^threshold_sensitivity = -1"),
        ({"selection": "hardest"}, "^selection = 'hardest'"),
        ({"warmup_steps": -1}, "^warmup_steps = -1"),
    ],
    ids=str,
)
def test_errors_name_the_parameter(setting: dict[str, Any], message: str) -> None:
    router = create_truncated_router(model := tiny_model("llama"), 1)
    for create in (CGGRLoss, partial(CGGRScorer, router), partial(wrapped, model)):
        with pytest.raises(InvalidInput, match=message):
            create(**setting)


def test_a_sensitivity_above_1_stays_within_half_of_the_ratio() -> None:
    for sensitivity in (2.0, 100.0):
        cggr = wrapped(
            tiny_model("llama"), dynamic_threshold=True, threshold_sensitivity=sensitivity
        )
        ratio = cggr.gradients.selector.schedule.ratio
        assert ratio(0.99) == 0.25 / 2 and ratio(0.0) == pytest.approx(
            min(1.0, 0.25 * (1 + sensitivity))
        )


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
