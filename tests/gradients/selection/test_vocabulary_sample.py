"""Some words stand for the vocabulary: what they tell is right on average, and right if all are
read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pliant.gradients import GradientConfig, attach
from pliant.gradients.selection import vocabulary_sample
from pliant.gradients.selection.scores import difficulty
from pliant.gradients.selection.vocabulary_sample import VocabularySample

V, D = 60, 8


def way(head: nn.Module, spoil: Any = None) -> vocabulary_sample.LogitsBy:
    """From hidden states to logits: the head, or what answers for it, and what comes after."""

    def logits(rows: Tensor, instead: vocabulary_sample.PartialHead | None = None) -> Tensor:
        made = head(rows) if instead is None else instead(head.forward, (rows,), {})
        return made if spoil is None else spoil(made)

    return logits


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 40), st.integers(2, V), st.integers(0, 2**32))
def test_each_word_is_read_once_and_they_stand_for_all(n: int, some: int, seed: int) -> None:
    head, targets = nn.Linear(D, V), torch.randint(V, (n,))
    read = VocabularySample.draw(head, targets, some, generator(seed))
    assert len(set(read.ids_C.tolist())) == len(read.ids_C) == some
    assert float(read.represents_C.sum()) == pytest.approx(V, rel=1e-5)
    assert torch.equal(read.index_V[read.ids_C], torch.arange(some))
    assert int((read.index_V >= 0).sum()) == some
    own = set(read.ids_C[: some // 2].tolist())
    frequent = targets.bincount(minlength=V)
    left_out = [frequent[w] for w in range(V) if w not in own]
    if own and left_out:
        assert min(frequent[w] for w in own) >= max(left_out)


@pytest.mark.parametrize("bias", [True, False])
def test_if_all_words_are_read_the_scores_are_the_whole_vocabularys(bias: bool) -> None:
    head, hidden, targets = nn.Linear(D, V, bias=bias), torch.randn(30, D), torch.randint(V, (30,))
    with torch.no_grad():
        head.weight.mul_(8)
    read = VocabularySample.draw(head, targets, V, generator())
    found = read.scores(way(head), hidden, targets, "gradient")
    torch.testing.assert_close(found.scores_N, difficulty(head(hidden), targets, "gradient"))
    torch.testing.assert_close(found.losses_N, difficulty(head(hidden), targets, "loss"))
    by_loss = read.scores(way(head), hidden, targets, "loss")
    assert torch.equal(by_loss.scores_N, found.losses_N)


def test_what_all_words_add_up_to_is_estimated_without_bias() -> None:
    """exp(loss) is the sum over all words, over the target's own share of it."""
    head, hidden, targets = nn.Linear(D, V), 3 * torch.randn(5, D), torch.randint(V, (5,))
    drawn = [VocabularySample.draw(head, targets, 20, generator(seed)) for seed in range(600)]
    sums = torch.stack(
        [read.scores(way(head), hidden, targets, "loss").losses_N.exp() for read in drawn]
    )
    error = sums.std(0) / len(drawn) ** 0.5
    true = difficulty(head(hidden), targets, "loss").exp()
    assert ((sums.mean(0) - true).abs() <= 4 * error).all()
    assert (sums.std(0) > 0).all()


def test_a_word_that_stands_for_others_alike_gives_their_gradients_length() -> None:
    """Where all logits are alike, nothing is left to chance."""
    head, hidden, targets = nn.Linear(D, V, bias=False), torch.randn(6, D), torch.randint(V, (6,))
    nn.init.zeros_(head.weight)
    read = VocabularySample.draw(head, targets, 20, generator())
    found = read.scores(way(head), hidden, targets, "gradient")
    torch.testing.assert_close(found.scores_N, difficulty(head(hidden), targets, "gradient"))
    torch.testing.assert_close(found.losses_N, difficulty(head(hidden), targets, "loss"))


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_chunks_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, targets = nn.Linear(D, V), torch.randn(30, D), torch.randint(V, (30,))
    read = VocabularySample.draw(head, targets, 12, generator())
    whole = read.scores(way(head), hidden, targets, "gradient")
    monkeypatch.setattr(vocabulary_sample, "at_once", lambda device, vocabulary: rows)
    again = read.scores(way(head), hidden, targets, "gradient")
    torch.testing.assert_close(again.scores_N, whole.scores_N)


def masked(logits: Tensor) -> Tensor:
    """What a model does that must never say some words."""
    return logits.index_fill(-1, torch.arange(5), -1e4)


def closed(logits: Tensor) -> Tensor:
    """The same for words at the end, which are there only where all words are."""
    return torch.where(torch.arange(logits.shape[-1]) < 40, logits, -torch.inf)


@pytest.mark.parametrize(
    ("spoil", "fine"),
    [
        (None, True),
        (lambda logits: 30 * torch.tanh(logits / 30), True),
        (lambda logits: logits.float() * 0.25, True),
        (masked, False),
        (closed, False),
        (lambda logits: logits.log_softmax(-1), False),
        (lambda logits: logits[:, : V - 1], False),
        (lambda logits: logits + torch.zeros(V), False),
    ],
    ids=["plain", "capped", "scaled", "masked", "closed", "normed", "cut", "of one size"],
)
def test_a_way_that_tells_words_apart_is_found_out(spoil: Any, fine: bool) -> None:
    head, hidden, targets = nn.Linear(D, V), torch.randn(16, D), torch.randint(V, (16,))
    read = VocabularySample.draw(head, targets, 30, generator())
    assert read.agrees(way(head, spoil), hidden, targets) == fine


HEAD = nn.Linear(4, 20_000, device="meta")


@pytest.mark.parametrize(
    ("change", "some"),
    [
        ({}, 2500),
        ({"score": "loss"}, 2500),
        ({"score_share": 0.01}, vocabulary_sample.MINIMUM),
        ({"score_share": 1.0}, None),
        ({"score": "entropy"}, None),
        ({"dynamic": True}, None),
        ({"selection": "topk"}, None),
    ],
)
def test_how_many_words_are_read(change: dict[str, Any], some: int | None) -> None:
    assert vocabulary_sample.sample_size(HEAD, replace(GradientConfig(), **change)) == some


def test_small_vocabularies_and_other_heads_are_read_whole() -> None:
    assert (
        vocabulary_sample.sample_size(nn.Linear(4, vocabulary_sample.MINIMUM), GradientConfig())
        is None
    )
    assert vocabulary_sample.sample_size(nn.Sequential(HEAD), GradientConfig()) is None
    assert vocabulary_sample.sample_size(None, GradientConfig()) is None


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    monkeypatch.setattr(vocabulary_sample, "MINIMUM", 8)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).train()


def test_a_step_reads_some_of_the_head_and_stays_unbiased(model: Any) -> None:
    ids = torch.randint(64, (2, 9))
    gradients = attach(model, GradientConfig(engine="exact", score_share=0.25, mix=0.5))
    with torch.no_grad():  # sure of some of it, so that scores differ
        model.lm_head.weight.mul_(20)
    true = model.eval()(input_ids=ids, labels=ids).loss.item()
    model.train()
    losses = torch.tensor([model(input_ids=ids, labels=ids).loss.item() for _ in range(500)])
    assert abs(losses.mean() - true) <= 4 * losses.std() / len(losses) ** 0.5
    assert gradients.metrics()["head_passes"] == pytest.approx(16 * 17 / 64)


def test_the_loss_that_was_not_trained_is_told_on_average(model: Any) -> None:
    ids = torch.randint(64, (2, 9))
    for settings in ({"score_share": 0.25}, {"selection": "uniform"}):
        gradients = attach(model, GradientConfig(engine="exact", **settings))
        sums = []
        for _ in range(200):
            model(input_ids=ids, labels=ids)
            found = gradients.metrics()
            left = found["tokens_total"] - found["tokens_selected"]
            both = found["loss_selected"] * found["tokens_selected"]
            sums.append(both + found["loss_unselected"] * left)
        gradients.detach()
        told = torch.tensor(sums) / 16
        true = model.eval()(input_ids=ids, labels=ids).loss.item()
        model.train()
        assert abs(told.mean() - true) <= 4 * told.std() / len(told) ** 0.5


def test_a_model_with_a_way_of_its_own_is_read_whole(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, out: masked(out))
    gradients = attach(model, GradientConfig(score_share=0.25))
    ids = torch.randint(10, 64, (2, 9))
    model(input_ids=ids, labels=ids)
    assert gradients.metrics()["head_passes"] >= 16
    assert "loss_unselected" in gradients.metrics()


@pytest.mark.parametrize("spoil", [None, masked], ids=["read in part", "read whole"])
def test_a_resumed_training_draws_what_it_would_have_drawn(model: Any, spoil: Any) -> None:
    if spoil is not None:
        model.lm_head.register_forward_hook(lambda module, args, out: spoil(out))
    batches = torch.randint(10, 64, (4, 2, 30))
    config = GradientConfig(score_share=0.25)

    def losses(gradients: Any, some: Tensor) -> list[float]:
        found = [model(input_ids=ids, labels=ids).loss.item() for ids in some]
        gradients.detach()
        return found

    whole = losses(attach(model, config), batches)
    begun = attach(model, config)
    losses(begun, batches[:2])
    resumed = attach(model, config)
    resumed.set_extra_state(begun.get_extra_state())
    assert losses(resumed, batches[2:]) == whole[2:]
