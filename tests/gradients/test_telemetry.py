"""What is told of a step is what it did: tokens, losses on both sides, and what was run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from pliant.gradients import GradientConfig, attach
from pliant.gradients.telemetry import Telemetry

B, T = 3, 16


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).train()


@pytest.fixture
def batch() -> dict[str, Any]:
    ids = torch.randint(0, 50, (B, T))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels}


VALID = B * (T - 4)
KEPT = B * 3  # a quarter of 12 in each row


def losses(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"]).logits
        model.train()
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
    )


@pytest.mark.parametrize("engine", ["sparse", "exact"])
def test_the_losses_of_both_sides_make_up_the_loss_of_all(
    model: Any, batch: dict[str, Any], engine: Any
) -> None:
    told = losses(model, batch)
    gradients = attach(model, GradientConfig(engine=engine))
    model(**batch)
    found = gradients.metrics()
    assert found["tokens_selected"] == KEPT and found["tokens_total"] == VALID
    assert found["ratio"] == KEPT / VALID
    both = KEPT * found["loss_selected"] + (VALID - KEPT) * found["loss_unselected"]
    assert both == pytest.approx(float(told.sum()), rel=1e-5)
    assert found["loss_selected"] != pytest.approx(found["loss_unselected"], rel=1e-3)


def test_what_was_not_scored_is_not_told(model: Any, batch: dict[str, Any]) -> None:
    """Of the hardest by a layer below, nothing follows for the others' loss."""
    gradients = attach(model, GradientConfig(selection="topk", exit_layer=1))
    model(**batch)
    assert "loss_unselected" not in gradients.metrics()


def test_without_scores_the_head_runs_on_the_chosen_alone(
    model: Any, batch: dict[str, Any]
) -> None:
    gradients = attach(model, GradientConfig(selection="uniform"))
    model(**batch)
    assert gradients.metrics()["head_passes"] == 0


def test_the_ledger_counts_what_each_engine_runs(model: Any, batch: dict[str, Any]) -> None:
    def run(**settings: Any) -> tuple[float, ...]:
        gradients = attach(model, GradientConfig(**settings))
        model(**batch)
        found = gradients.metrics()
        gradients.detach()
        names = ("backbone_passes", "backbone_trained", "head_passes", "head_trained")
        return tuple(found[name] for name in names)

    assert run(engine="sparse") == (B * T, KEPT, VALID, KEPT)
    assert run(engine="exact") == (0, B * T, VALID, KEPT)
    assert run(engine="exact", selection="all") == (0, B * T, 0, VALID)
    assert run(engine="sparse", dense_first=1) == (0, B * T, 0, VALID)
    # The prompt's three positions that predict no label, then the twelve that do.
    assert run(engine="completion") == (B * 3, B * 12, 0, VALID)


def test_the_operations_are_two_a_weight_forward_and_four_back(
    model: Any, batch: dict[str, Any]
) -> None:
    layers = sum(p.numel() for p in model.model.layers.parameters())
    layers += sum(p.numel() for p in model.model.norm.parameters())
    head = model.lm_head.weight.numel()
    gradients = attach(model, GradientConfig())
    model(**batch)
    found = gradients.metrics()
    quiet, live = 2 * (B * T * layers + VALID * head), 6 * KEPT * (layers + head)
    assert found["flops"] == quiet + live
    assert found["flops_of_standard"] == pytest.approx(
        found["flops"] / (6 * B * T * (layers + head))
    )
    gradients.detach()
    model.model.layers.requires_grad_(False)  # what is not trained has no products of its own
    frozen = attach(model, GradientConfig())
    model(**batch)
    assert frozen.metrics()["flops"] < found["flops"]


def test_sums_run_on_while_a_log_begins_anew(model: Any, batch: dict[str, Any]) -> None:
    gradients = attach(model, GradientConfig(dense_first=1))
    model(**batch)
    model(**batch)
    assert gradients.logged()["tokens_selected"] == VALID + KEPT
    model(**batch)
    assert gradients.logged()["tokens_selected"] == KEPT
    assert gradients.logged() == {}
    assert gradients.totals()["tokens_selected"] == VALID + 2 * KEPT
    assert gradients.totals()["tokens_total"] == 3 * VALID


def test_nothing_is_waited_for_until_it_is_asked(
    model: Any, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients, asked = attach(model, GradientConfig(selection="uniform")), []
    for name in ("item", "tolist", "cpu"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, real=real, name=name: asked.append(name) or real(self, *a),
        )
    trained = Telemetry.trained
    inside: list[list[str]] = []

    def watched(self: Telemetry, *args: Any, **named: Any) -> None:
        before = len(asked)
        trained(self, *args, **named)
        inside.append(asked[before:])

    monkeypatch.setattr(Telemetry, "trained", watched)
    model(**batch)
    assert inside == [[]]
    gradients.metrics()
    assert asked, "asking does wait"


def test_a_batch_without_labels_counts_for_nothing(model: Any, batch: dict[str, Any]) -> None:
    gradients = attach(model, GradientConfig())
    assert gradients.metrics() == {}
    model(input_ids=batch["input_ids"], labels=torch.full((B, T), -100))
    found = gradients.metrics()
    assert found["tokens_selected"] == found["tokens_total"] == 0
    assert found["loss_selected"] == 0


def test_checkpointing_runs_the_trained_tokens_once_more(model: Any, batch: dict[str, Any]) -> None:
    model.gradient_checkpointing_enable()
    for engine, quiet in (("sparse", B * T + KEPT), ("exact", B * T)):
        gradients = attach(model, GradientConfig(engine=engine))  # type: ignore[arg-type]
        model(**batch).loss.backward()
        assert gradients.metrics()["backbone_passes"] == quiet
        gradients.detach()


def test_a_long_run_is_counted_to_the_token(model: Any, batch: dict[str, Any]) -> None:
    gradients = attach(model, GradientConfig(selection="uniform"))
    model(**batch)
    run = gradients.telemetry.run
    assert run.sums_4 is not None
    run.sums_4[0] = 2**30 + 1
    model(**batch)
    assert gradients.totals()["tokens_total"] == 2**30 + 1 + VALID
