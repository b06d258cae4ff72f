"""CGGRLoss: pairs as the seed gives them, outputs shifted, Trainer's counts, and what it tells."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from pliant.anatomy.tiny import tiny_model
from pliant.errors import InvalidInput
from pliant.gradients.cautions import BIASED, BiasedWarning
from pliant.gradients.facade.loss import CGGRLoss

V = 7


def criterion(selection: str = "topk", **settings: Any) -> CGGRLoss:
    """At its full sparsity from the start, and without the warning that the default gives."""
    plain = {"warmup_steps": 0, "dynamic_threshold": False, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BiasedWarning)
        return CGGRLoss(selection=selection, **plain)  # type: ignore[arg-type]


def pairs(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, V, requires_grad=True), torch.randint(V, shape)


def hardest(logits_NV: Tensor, targets_N: Tensor, k: int) -> Tensor:
    losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
    return losses_N.topk(k).values.mean()


def test_flat_pairs_are_aligned() -> None:
    logits, targets = pairs(20)
    found = criterion(scoring="loss")(logits, targets)
    torch.testing.assert_close(found, hardest(logits, targets, 5))


def test_pairs_of_a_batch_are_aligned_row_by_row() -> None:
    logits, targets = pairs(3, 20)
    found = criterion(scoring="loss")(logits, targets)
    rows = [hardest(x, y, 5) for x, y in zip(logits, targets, strict=True)]
    torch.testing.assert_close(found, torch.stack(rows).mean())


@pytest.mark.parametrize("kind", ["output", "dict", "tuple", "loss first"])
def test_a_models_output_is_shifted(kind: str) -> None:
    logits, labels = pairs(3, 21)
    given_as = {
        "output": CausalLMOutput(logits=logits),
        "dict": {"logits": logits},
        "tuple": (logits,),
        "loss first": (torch.zeros(()), logits),
    }
    found = criterion(scoring="loss")(given_as[kind], labels)
    expected = criterion(scoring="loss")(logits[:, :-1], labels[:, 1:])
    torch.testing.assert_close(found, expected)


def test_only_the_chosen_get_a_gradient() -> None:
    logits, targets = pairs(40)
    criterion(scoring="margin")(logits, targets).backward()
    assert logits.grad is not None
    trained = logits.grad.abs().sum(-1) > 0
    top = logits.detach().softmax(-1).topk(2).values
    easiest_chosen = (1 - top[:, 0] + top[:, 1])[trained].min()
    assert trained.sum() == 10
    assert ((1 - top[:, 0] + top[:, 1])[~trained] <= easiest_chosen).all()


@pytest.mark.parametrize("shape", [(6,), (2, 6)])
@pytest.mark.parametrize("selection", ["topk", "stratified", "sequence_aware", "sampled", "all"])
def test_nothing_to_learn_is_a_differentiable_0(shape: tuple[int, ...], selection: str) -> None:
    logits, targets = pairs(*shape)
    logits = torch.full_like(logits, torch.nan, requires_grad=True)
    loss = criterion(selection)(logits, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


@given(st.sampled_from(["topk", "stratified", "sequence_aware", "uniform", "fixed_quota", "all"]))
def test_at_ratio_1_it_is_the_cross_entropy(selection: str) -> None:
    logits, targets = pairs(3, 8)
    targets[0, 3:] = -100
    found = criterion(selection, min_tokens_ratio=1.0)(logits, targets)
    torch.testing.assert_close(found, F.cross_entropy(logits.view(-1, V), targets.view(-1)))


def test_ignored_targets_are_neither_counted_nor_chosen() -> None:
    logits, targets = pairs(20)
    targets[::2] = -100
    rule = criterion(scoring="loss", min_tokens_ratio=0.5)
    found = rule(logits, targets)
    torch.testing.assert_close(found, hardest(logits[1::2], targets[1::2], 5))
    told = rule.get_metrics()
    assert (told["tokens_selected"], told["tokens_total"]) == (5, 10)


def test_sampled_is_the_loss_of_all_tokens_on_average() -> None:
    logits, targets = pairs(60)
    logits = logits.detach() * 3
    rule = criterion("sampled", scoring="gradient")
    found = torch.stack([rule(logits, targets) for _ in range(600)])
    true = F.cross_entropy(logits, targets)
    assert (found.mean() - true).abs() < 5 * found.std() / math.sqrt(600) < 0.2 * true


@pytest.mark.parametrize("off", ["no_grad", "eval"])
def test_evaluation_is_of_all_tokens(off: str) -> None:
    logits, targets = pairs(3, 8)
    rule = criterion()
    rule.train(off == "no_grad")
    with torch.set_grad_enabled(off == "eval"):
        found = rule(logits, targets)
    torch.testing.assert_close(found, F.cross_entropy(logits.view(-1, V), targets.view(-1)))
    assert not rule.get_metrics()


def test_the_curriculum_starts_at_exactly_all_and_falls_by_itself() -> None:
    logits, targets = pairs(100)
    rule = criterion(warmup_steps=3, dynamic_threshold=True)
    seen = []
    for _ in range(5):
        rule(logits, targets)
        seen.append(rule.get_metrics())
    assert [m["step"] for m in seen] == [0, 1, 2, 3, 4]
    assert seen[0]["token_ratio"] == 1.0 and seen[0]["tokens_selected"] == 100
    assert seen[1]["token_ratio"] > seen[2]["token_ratio"] > seen[3]["token_ratio"]


def test_a_users_own_step_takes_over() -> None:
    logits, targets = pairs(100)
    rule = criterion(warmup_steps=4, scoring="loss")
    counts = []
    for _ in range(3):
        for _ in range(2):  # accumulated by hand
            rule(logits, targets)
            counts.append(rule.get_metrics()["tokens_selected"])
        rule.step()
    # Nobody had stepped yet at the second: it counted as a step of its own, and is put right.
    assert counts == [100, 82, 82, 82, 63, 63]


def test_its_steps_can_be_read_and_set() -> None:
    """As the published package's buffer."""
    rule, (logits, targets) = criterion("topk", warmup_steps=1000), pairs(2, 8)
    assert rule.step_count.item() == 0
    rule.step_count.fill_(500)
    for _ in range(2):
        rule(logits, targets)  # forward passes after it count as steps, as ever
    assert rule.get_metrics()["token_ratio"] == pytest.approx(1 - 0.501 * 0.75)
    rule.step()
    assert rule.step_count.item() == 501, "what came before the first call was one step"
    rule.step_count.fill_(9)
    rule.step()
    assert rule.step_count.item() == 10
    assert rule.get_extra_state()["steps"] == 10


def test_the_dynamic_threshold_moves_both_ways() -> None:
    sure, unsure = torch.eye(V).repeat(20, 1) * 30, torch.zeros(20 * V, V)
    targets = torch.randint(V, (20 * V,))
    rule = criterion(dynamic_threshold=True, min_tokens_ratio=0.4, threshold_sensitivity=0.5)
    ratios = []
    for logits in (sure, unsure):
        rule(logits, targets)
        ratios.append(rule.get_metrics()["token_ratio"])
    assert ratios == pytest.approx([0.4 * 0.5, 0.4 * (1 + 0.5 * (1 - 2 / V))])
    fixed = criterion("fixed_quota", dynamic_threshold=True, min_tokens_ratio=0.4)
    fixed(unsure, targets)
    assert fixed.get_metrics()["token_ratio"] == 0.4


def test_metrics_are_the_published_packages_and_more() -> None:
    logits, targets = pairs(2, 30)
    rule = criterion()
    assert rule.get_metrics() == {}
    rule(logits, targets)
    told = rule.get_metrics()
    p = logits.detach().softmax(-1)
    assert told["avg_confidence"] == pytest.approx(p.amax(-1).mean().item(), rel=1e-5)
    assert told["avg_entropy"] == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-5)
    assert told["avg_difficulty"] < told["avg_difficulty_selected"]
    assert (told["selection"], told["scoring"], told["step"]) == ("topk", "combined", 0)
    assert (told["token_ratio"], told["tokens_selected"], told["tokens_total"]) == (0.25, 16, 60)
    told.clear()
    assert rule.get_metrics(), "a copy was given"


@pytest.mark.parametrize("selection", BIASED)
def test_who_trains_another_loss_is_told(selection: Any) -> None:
    with pytest.warns(BiasedWarning, match="docs/gradients-seed.md") as told:
        rule = CGGRLoss(selection=selection)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule(*pairs(10))
        CGGRLoss(selection=selection, min_tokens_ratio=1.0)
        CGGRLoss(selection="sampled")


def test_a_base_loss_of_ones_own() -> None:
    logits, targets = pairs(20)
    targets[3] = 5
    smooth = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1, ignore_index=5)
    rule = criterion("all", base_loss=smooth)
    kept = targets != 5
    torch.testing.assert_close(rule(logits, targets), smooth(logits[kept], targets[kept]).mean())
    with pytest.raises(InvalidInput, match='reduction="none"'):
        criterion("all", base_loss=nn.CrossEntropyLoss())(logits, targets)


def test_its_steps_are_its_state() -> None:
    logits, targets = pairs(40)
    rule = criterion("sampled", warmup_steps=10)
    for _ in range(4):
        rule(logits, targets)
    resumed = criterion("sampled", warmup_steps=10)
    resumed.load_state_dict(copy.deepcopy(rule.state_dict()))
    assert torch.equal(rule(logits, targets), resumed(logits, targets)), "the same draw, too"
    assert resumed.get_metrics()["step"] == 4


def test_bad_input_is_named() -> None:
    logits, targets = pairs(2, 6)
    with pytest.raises(InvalidInput, match=r"\(2, 5\) for logits of \(2, 6, 7\)"):
        criterion()(logits, targets[:, :5])
    with pytest.raises(InvalidInput, match="no targets"):
        criterion()(logits)
    with pytest.raises(InvalidInput, match="without logits"):
        criterion()(CausalLMOutput(), targets)
    with pytest.raises(InvalidInput, match="^scoring = 'excess'"):
        criterion("sampled", scoring="excess")
    with pytest.raises(InvalidInput, match="selection = 'hardest'"):
        criterion("hardest")


# --- under a Trainer -----------------------------------------------------------------------------


def trained(folder: Path, rule: CGGRLoss, **arguments: Any) -> tuple[nn.Module, list[float]]:
    """Three optimizer steps of four rows each, however they are cut into batches."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(5, 100, (12, 10), generator=generator)
    labels = rows.clone()
    labels[::3, :4] = -100
    labels[5] = -100  # a batch of one row then has nothing to learn
    data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": labels.tolist()})
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=0.0,
        report_to=[],
        seed=1,
        **arguments,
    )
    model = tiny_model("llama").train()
    trainer = Trainer(model=model, args=args, train_dataset=data, compute_loss_func=rule)
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("rows", [1, 2])
def test_accumulated_batches_are_one_large_one(tmp_path: Path, rows: int) -> None:
    runs = []
    for size in (rows, 4):
        rule = criterion(scoring="gradient", warmup_steps=2)
        runs.append(
            trained(
                tmp_path,
                rule,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=4 // size,
            )
        )
        assert rule.get_metrics()["step"] == 2, "optimizer steps, not batches"
        assert rule.get_extra_state()["steps"] == 3
    (cut, cut_losses), (whole, whole_losses) = runs
    assert cut_losses == pytest.approx(whole_losses, abs=2e-4)
    for one, other in zip(cut.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_trainer_evaluates_all_tokens(tmp_path: Path) -> None:
    rows = torch.randint(5, 100, (4, 10))
    data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})
    model = tiny_model("llama")
    args = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, report_to=[])
    trainer = Trainer(model=model, args=args, eval_dataset=data, compute_loss_func=criterion())
    expected = model(input_ids=rows, labels=rows).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
