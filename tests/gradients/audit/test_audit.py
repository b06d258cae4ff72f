"""The audit tells a good gradient from a bad one, says what a step costs, and leaves no trace."""

from __future__ import annotations

import gc
import json
import random
from typing import Any

import pytest
import torch
from tests.gradients.audit.conftest import batch_like, rows_like

from pliant.adapters import attached
from pliant.anatomy.tiny import tiny_model
from pliant.data.collate import Collator
from pliant.errors import InvalidInput
from pliant.gradients import GradientConfig, attach
from pliant.gradients.audit import audit
from pliant.gradients.audit.contenders import STANDARD, Contender, Field, row_sums, select_rows
from pliant.gradients.audit.step import GradientComparison, Peak


@pytest.fixture(scope="module")
def found() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 200, (2, 4, 64))
    return audit(model, [{"input_ids": one, "labels": one} for one in ids], draws=16, turns=1)


def test_standard_training_is_its_own_measure(found: Any) -> None:
    quality, cost = found["standard"].quality, found["standard"].cost
    assert quality.cosine.value == pytest.approx(1) and quality.norm == pytest.approx(1)
    assert quality.bias == pytest.approx(0, abs=1e-6) and quality.variance == 0
    assert cost.speed.value == 1 and cost.operations == 1


def test_an_unbiased_rule_is_found_unbiased_and_the_hardest_tokens_are_not(found: Any) -> None:
    for name in ("sampled .25, exact", "uniform .25, exact"):
        quality = found[name].quality
        noise = (quality.variance / 16) ** 0.5
        assert quality.bias < 0.6 * noise + 0.02, (name, quality)
        assert quality.variance > 0.1
        assert quality.mean_cosine > quality.cosine.value
    assert found["topk .25, exact"].quality.bias > 0.3
    assert found["topk .25, exact"].quality.variance == 0  # it always chooses the same


def test_keys_and_values_that_are_cut_off_are_a_bias(found: Any) -> None:
    sparse, exact = found["uniform .25, sparse"].quality, found["uniform .25, exact"].quality
    assert sparse.bias > exact.bias + 0.1


def test_less_is_held_and_run_where_fewer_tokens_train(found: Any) -> None:
    share = {finding.name: found.memory(finding) for finding in found.findings}
    assert share["sampled .25, sparse"] < 0.6 < share["sampled .25, exact"] < 1
    operations = {finding.name: finding.cost.operations for finding in found.findings}
    assert operations["uniform .25, sparse"] < operations["sampled .25, sparse"] < 1
    rows = next(f for f in found.findings if f.contender.kind == "rows")
    # A batch of equal cost, as nearly as four sequences can be dealt.
    assert rows.cost.operations == pytest.approx(operations["sampled .25, sparse"], abs=1 / 8)


def test_what_was_asked_for_comes_first_and_all_controls_are_there(found: Any) -> None:
    assert found.ours.name == "sampled .25, sparse"
    kinds = [finding.contender.kind for finding in found.findings]
    assert kinds == ["tokens"] * 5 + ["hardest_rows", "rows", "standard"]
    assert found.sentence.startswith("sampled .25, sparse: ")
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["tokens"] == 2 * 4 * 63 and len(plain["findings"]) == 8


def test_the_model_is_left_as_it_was_found(model: Any) -> None:
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.model.layers[0].train()
    model.model.layers[1].eval()
    gradients = attach(model, GradientConfig(dense_first=3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    batch, grad = batch_like(), model.lm_head.weight.grad
    random_state, drawn = torch.get_rng_state(), random.getstate()
    audit(model, batch, draws=2, turns=1)
    assert all(before[name].equal(value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.get_rng_state().equal(random_state) and random.getstate() == drawn
    assert model.lm_head.weight.grad is grad and grad.eq(1).all()
    assert all(p.grad is None for p in model.model.parameters())
    assert attached(model) == {"gradients": gradients}
    assert gradients.metrics() == {} and gradients.selector.draws == 0


@pytest.mark.parametrize(("kind", "tokens"), [("llama", 2 * 9), ("bart", 2 * 10)])
def test_tokens_are_counted_as_the_model_holds_its_labels(kind: str, tokens: int) -> None:
    ids = torch.randint(3, 90, (2, 10))
    found = audit(tiny_model(kind), {"input_ids": ids, "labels": ids.roll(-1)}, draws=2, turns=1)
    assert found.tokens == tokens


def test_it_is_left_so_after_an_error_too(model: Any) -> None:
    before = [module.training for module in model.modules()]
    batch = {**batch_like(), "labels": torch.zeros(4, 3, dtype=torch.long)}
    with pytest.raises(InvalidInput, match=r"\(4, 3\)"):
        audit(model, batch)
    assert [module.training for module in model.modules()] == before and not attached(model)


def test_with_everything_trained_each_gradient_is_the_full_one(model: Any) -> None:
    found = audit(model, batch_like(), GradientConfig(ratio=1.0), draws=2, turns=1)
    for finding in found.findings:
        assert finding.quality.cosine.value == pytest.approx(1, abs=1e-5), finding.name
        assert finding.quality.bias < 1e-3


def test_an_engine_that_is_not_exact_is_replaced_and_said(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    found = audit(model, batch_like(), draws=2, turns=1)
    assert any("dropout" in note for note in found.ours.notes)
    assert not found["standard"].notes
    # What drops out is the same wherever the whole batch runs: it is nobody's fault.
    assert found["standard"].quality.cosine.value == pytest.approx(1)


def test_of_a_lora_only_what_is_trained_is_compared(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    found = audit(wrapped, batch_like(), draws=2, turns=1)
    assert found["standard"].quality.cosine.value == pytest.approx(1)
    assert found["sampled .25, exact"].quality.variance > 0
    # Frozen weights have no gradient of their own to compute.
    assert found.ours.cost.operations is not None and not attached(wrapped)


def test_what_is_unusual_about_a_contender_is_in_its_name() -> None:
    def named(**settings: Any) -> str:
        return Contender("tokens", GradientConfig(**settings)).name

    assert named(seed=7) == "sampled .25, sparse"
    assert named(mix=0.75, score="loss", kv_grad="one_hop", ratio=0.1, exit_layer=2) == (
        "sampled .1, sparse, loss, one_hop, mix 0.75, exit_layer 2"
    )
    assert named(engine="exact", selection="uniform", kv_grad="full", score="loss") == (
        "uniform .25, exact"
    )
    assert named(engine="completion") == "completion only"


def test_one_row_has_no_smaller_batch(model: Any) -> None:
    found = audit(model, batch_like(rows=1), draws=2, turns=1)
    assert {finding.contender.kind for finding in found.findings} == {"tokens", "standard"}


@pytest.mark.parametrize(
    ("batches", "options", "said"),
    [
        ([], {}, "no batches"),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long)}, {}, "no labels"),
        ({"labels": torch.ones(2, 4, dtype=torch.long)}, {}, "input_ids"),
        (
            {
                "input_ids": torch.ones(2, 4, dtype=torch.long),
                "labels": torch.full((2, 4), -100),
            },
            {},
            "labelled",
        ),
        (batch_like(), {"draws": 1}, "draws = 1"),
        (batch_like(), {"turns": 0}, "turns = 0"),
    ],
)
def test_bad_input_is_named(model: Any, batches: Any, options: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        audit(model, batches, **options)


def test_a_model_of_which_nothing_is_trained_has_no_gradient(model: Any) -> None:
    model.requires_grad_(False)
    with pytest.raises(InvalidInput, match="no parameter"):
        audit(model, batch_like())


def test_the_statistics_are_those_of_the_draws(model: Any) -> None:
    """Held against gradients that are kept, all of them."""
    batch, draws = batch_like(), 5
    uniform = Contender("tokens", GradientConfig(engine="exact", selection="uniform"))

    def gradient() -> torch.Tensor:
        flat = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
        model.zero_grad()
        return flat

    model.train()
    with Field(model, [uniform, STANDARD]) as field:
        field.step(STANDARD, batch)
        full, kept = gradient(), []
        for draw in range(draws):
            field.step(uniform, batch, draw)
            kept.append(gradient())
        judge = GradientComparison(field, draws)
        judge.add(batch)
        quality = judge.quality(uniform)
    all_of_them = torch.stack(kept)
    mean, variance = all_of_them.mean(0), all_of_them.var(0).sum()
    cosines = torch.cosine_similarity(all_of_them, full[None], dim=1)
    error = (mean - full).square().sum() - variance / draws
    assert quality.cosine.value == pytest.approx(float(cosines.mean()), rel=1e-4)
    assert quality.variance == pytest.approx(float(variance / full.square().sum()), rel=1e-4)
    norm = float((all_of_them.norm(dim=1) / full.norm()).mean())
    assert quality.norm == pytest.approx(norm, rel=1e-4)
    expected = float(error.clamp(min=0).sqrt() / full.norm())
    assert quality.bias == pytest.approx(expected, abs=1e-3)


def test_rows_are_taken_without_what_is_padding_in_them() -> None:
    batch = Collator()([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}, {"input_ids": [5, 6]}])
    some = select_rows(batch, torch.tensor([1, 2]))
    assert some["input_ids"].tolist() == [[4, 0], [5, 6]]
    assert some["labels"].tolist() == [[4, -100], [5, 6]]
    assert some["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_the_hardest_rows_are_those_that_the_model_finds_hard(model: Any) -> None:
    easy = torch.full((4, 16), 3)
    with torch.no_grad():
        model.lm_head.weight[3] = 5 * model.model.norm(model.model(easy).last_hidden_state)[0, -1]
    batch = {"input_ids": easy.clone(), "labels": easy.clone()}
    batch["input_ids"][2] = batch["labels"][2] = torch.randint(4, 20, (16,))
    scores, tokens = row_sums(model, batch, "combined")
    assert int((scores / tokens).argmax()) == 2


def test_the_peak_counts_what_is_alive_at_once() -> None:
    with Peak() as peak:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a.view(10, 100)  # the same ones
        del a
        assert peak.now == 4000
        c = b + 1
        assert peak.now == 8000
        del b
        gc.collect()
        assert peak.now == 4000
        c += 1  # in place
        d = c.double()
        del c, d
    assert (peak.now, peak.most) == (0, 12000)


def test_a_row_says_what_it_lacks() -> None:
    with pytest.raises(InvalidInput, match="text"):
        Collator()([{"text": "a"}])
    with pytest.raises(InvalidInput, match="3 input_ids has 2 labels"):
        Collator()([{"input_ids": [1, 2, 3], "labels": [1, 2]}])
    assert len(Collator()(rows_like(3))["input_ids"]) == 3
