"""CGGRScorer: scores stand at the positions that predict, and the mask has a static shape."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.anatomy.tiny import tiny_model
from pliant.errors import InvalidInput
from pliant.gradients.facade.scorer import CGGRScorer, create_truncated_router
from pliant.gradients.selection.scores import difficulty

IDS = torch.randint(5, 100, (3, 12), generator=torch.Generator().manual_seed(0))


def scorer(**settings: Any) -> CGGRScorer:
    plain = {"warmup_steps": 0, "dynamic_threshold": False, **settings}
    return CGGRScorer(create_truncated_router(tiny_model("llama"), num_layers=2), **plain)


def test_what_it_gives() -> None:
    found, mask, info = scorer(min_tokens_ratio=0.5)(IDS)
    assert found.shape == mask.shape == IDS.shape
    assert mask.dtype == torch.bool and found.dtype == torch.float32
    assert mask.sum(-1).tolist() == [6, 6, 6]
    assert (found[mask].view(3, 6).amin(-1) >= found[~mask].view(3, 6).amax(-1)).all()
    assert info["current_ratio"] == 0.5
    assert info["confidence"].shape == info["entropy"].shape == info["weights"].shape == IDS.shape
    assert not found.requires_grad
    x = torch.randn(*IDS.shape, 4)
    assert (x * mask.unsqueeze(-1))[~mask].abs().sum() == 0


class Oracle(nn.Module):
    """Knows the next token but at one position, where it is sure of another."""

    def __init__(self, wrong_at: int) -> None:
        super().__init__()
        self.wrong_at = wrong_at

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        said = input_ids.roll(-1, dims=1)
        said[:, self.wrong_at] += 1
        return nn.functional.one_hot(said, 128).float() * 20


@pytest.mark.parametrize("wrong_at", [0, 4, 10])
def test_a_score_stands_where_the_label_is_predicted(wrong_at: int) -> None:
    """Position t is hard for what it says of token t + 1, and for nothing else."""
    rule = CGGRScorer(
        Oracle(wrong_at), min_tokens_ratio=0.08, warmup_steps=0, dynamic_threshold=False
    )
    found, mask, _ = rule(IDS, labels=IDS)
    assert mask.nonzero().tolist() == [[row, wrong_at] for row in range(3)]
    assert found[:, :-1].argmax(-1).tolist() == [wrong_at] * 3


def test_labels_say_which_positions_count() -> None:
    labels = IDS.clone()
    labels[0, :7] = -100
    labels[1] = -100
    found, mask, _ = scorer(min_tokens_ratio=1.0, scoring="loss")(IDS, labels=labels)
    assert mask.sum(-1).tolist() == [5, 0, 11]
    assert mask[0].nonzero()[:, 0].tolist() == [6, 7, 8, 9, 10], "each predicts the one after it"
    logits = create_truncated_router(tiny_model("llama"), num_layers=2)(IDS)
    expected = difficulty(logits[2, :-1].detach(), IDS[2, 1:], "loss")
    torch.testing.assert_close(found[2, :-1], expected)


@pytest.mark.parametrize("labels", [IDS[:, :5], IDS[0], IDS[:2]])
def test_labels_of_another_shape_are_named(labels: Tensor) -> None:
    with pytest.raises(InvalidInput, match=r"labels of shape \(.*\) for input_ids of \(3, 12\)"):
        scorer()(IDS, labels=labels)


def test_targets_are_not_taken_for_an_input_of_the_router() -> None:
    with pytest.raises(InvalidInput, match="targets: .* takes labels"):
        scorer()(IDS, targets=IDS)


def test_padding_is_never_chosen() -> None:
    attention_mask = torch.ones_like(IDS)
    attention_mask[0, :8] = 0
    _, mask, _ = scorer(min_tokens_ratio=0.5)(IDS, attention_mask=attention_mask)
    assert mask.sum(-1).tolist() == [2, 6, 6] and not mask[0, :8].any()


def test_without_labels_no_later_token_plays_a_part() -> None:
    """Scores of the first half stay when the second is another: nothing leaks into a route."""
    for scoring in ("entropy", "margin", "loss", "combined", "gradient", "doubt"):
        other = IDS.clone()
        other[:, 6:] = 5
        rule = scorer(scoring=scoring)
        torch.testing.assert_close(rule(IDS)[0][:, :6], rule(other)[0][:, :6])


def test_a_sample_says_what_its_tokens_weigh() -> None:
    rule = scorer(selection="sampled", min_tokens_ratio=0.25, scoring="gradient")
    _, mask, info = rule(IDS)
    assert mask.sum(-1).tolist() == [3, 3, 3]
    assert ((info["weights"] >= 1) == mask).all() and not info["weights"][~mask].any()
    assert not torch.equal(mask, rule(IDS)[1]), "each draw is another"


def test_the_curriculum_is_its_own_until_somebody_steps() -> None:
    rule = scorer(warmup_steps=2, dynamic_threshold=True)
    ratios = [rule(IDS)[2]["current_ratio"] for _ in range(4)]
    assert ratios[0] == 1.0 > ratios[1] > ratios[2] == ratios[3]
    rule.eval()
    steps = rule.schedule.steps
    rule(IDS)
    assert rule.schedule.steps == steps, "nothing is trained in eval mode"
    by_hand = scorer(warmup_steps=2)
    by_hand.step()
    assert by_hand(IDS)[2]["current_ratio"] == by_hand(IDS)[2]["current_ratio"] == 0.625


def test_its_steps_are_all_its_state() -> None:
    rule = scorer(warmup_steps=10)
    rule(IDS)
    state = rule.state_dict()
    assert list(state) == ["_extra_state"] and json.dumps(state["_extra_state"])
    other = scorer(warmup_steps=10)
    other.load_state_dict(state)
    assert other(IDS)[2]["current_ratio"] == rule(IDS)[2]["current_ratio"] < 1


def test_any_module_that_gives_logits_is_a_router() -> None:
    model = tiny_model("gpt2")
    whole = CGGRScorer(model, warmup_steps=0)(IDS)
    passed = CGGRScorer(create_truncated_router(model, len(model.transformer.h)), warmup_steps=0)
    assert torch.equal(whole[0], passed(IDS)[0]) and torch.equal(whole[1], passed(IDS)[1])
