"""Under transformers' Trainer: the same loss however a batch is cut, the same run after a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.minimal_adapter import tiny_llama
from tests.processes import run_two
from torch import nn
from transformers import (
    LlamaForCausalLM,
    LlamaForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from pliant.errors import InvalidInput
from pliant.gradients import GradientConfig, GradientsWarning, attach
from pliant.gradients.training import (
    PREFIX,
    SelectiveMixin,
    SelectiveTraining,
    make_selective,
    put_outside,
)

LENGTHS = (9, 14, 6, 11, 3, 12)
EVERY = GradientConfig(engine="exact", selection="uniform", ratio=1.0)
HARDEST = GradientConfig(engine="exact", selection="topk", ratio=0.4)
SAMPLED = GradientConfig(ratio=0.3, warmup_steps=3)


def rows(count: int = len(LENGTHS), seed: int = 3) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(1, 60, (LENGTHS[i % len(LENGTHS)],), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return found


def padded(some: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in some)

    def filled(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in some])

    ids = filled("input_ids", 0)
    return {"input_ids": ids, "labels": filled("labels", -100), "attention_mask": (ids > 0).long()}


def trainer(model: nn.Module, folder: Path, kind: Any = Trainer, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
    }
    own = {k: changes.pop(k) for k in ("callbacks", "selective") if k in changes}
    data = changes.pop("data", rows())
    args = TrainingArguments(output_dir=str(folder), **{**options, **changes})
    return kind(
        model, args, train_dataset=data, eval_dataset=rows(4, 8), data_collator=padded, **own
    )


def history(run: Any, key: str) -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


@pytest.mark.parametrize("config", [EVERY, HARDEST], ids=["every", "hardest"])
def test_ragged_batches_accumulated_are_one_large_batch(
    tmp_path: Path, config: GradientConfig
) -> None:
    trained = []
    for size, parts in ((6, 1), (2, 3), (1, 6)):
        run = trainer(
            tiny_llama(),
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
        )
        make_selective(run, config)
        assert run.model_accepts_loss_kwargs
        run.train()
        trained.append((history(run, "loss")[0], run.model.lm_head.weight.detach()))
    for loss, weight in trained[1:]:
        assert loss == pytest.approx(trained[0][0], rel=1e-5)
        assert torch.allclose(weight, trained[0][1], atol=1e-6)
    assert not torch.allclose(trained[0][1], tiny_llama().lm_head.weight, atol=1e-4)


class Bare(LlamaForCausalLM):
    """As models of one's own may be: told nothing that its author did not think of."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        labels: Any = None,
        use_cache: Any = None,
        return_dict: Any = None,
    ) -> Any:
        return super().forward(
            input_ids, attention_mask, labels=labels, use_cache=use_cache, return_dict=return_dict
        )


class TaggerForTokenClassification(LlamaForTokenClassification):
    """Its loss is that of labels which stand at their tokens; nothing is chosen."""

    accepts_loss_kwargs = False


def bare(kind: Any = Bare) -> Any:
    plain = tiny_llama()
    plain.config.num_labels, plain.config.classifier_dropout = 64, 0.0
    torch.manual_seed(0)
    model = kind(plain.config)
    if kind is Bare:
        model.load_state_dict(plain.state_dict())
    return model


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("kind", [Bare, TaggerForTokenClassification])
@pytest.mark.filterwarnings("ignore:.*nothing is chosen")
def test_a_model_that_takes_no_count_is_given_one(tmp_path: Path, kind: Any, early: bool) -> None:
    """Else each part of a step would weigh the same, however few tokens it has."""
    trained, config = [], HARDEST
    for size, parts in ((6, 1), (2, 3)):
        model = bare(kind)
        gradients = attach(model, config) if early else None
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        run = trainer(model, tmp_path, **options)
        gradients = make_selective(run, None if early else config)
        put_outside(gradients)
        run.train()
        ours = run.evaluate()["eval_loss"]
        trained.append((history(run, "loss")[0], next(model.parameters()).detach().clone()))
        gradients.detach()
        assert "accepts_loss_kwargs" not in vars(model)
        assert early or not run.model_accepts_loss_kwargs
        stock = trainer(model, tmp_path)
        assert not stock.model_accepts_loss_kwargs and ours == stock.evaluate()["eval_loss"]
    assert trained[0][0] == pytest.approx(trained[1][0], rel=1e-5)
    assert torch.allclose(trained[0][1], trained[1][1], atol=1e-6)


def test_at_ratio_one_it_is_the_trainers_own_training(tmp_path: Path) -> None:
    options = {"max_steps": 3, "gradient_accumulation_steps": 2}
    stock = trainer(tiny_llama(), tmp_path, **options)
    ours = trainer(tiny_llama(), tmp_path, **options)
    make_selective(ours, EVERY)
    stock.train()
    ours.train()
    assert history(ours, "loss") == pytest.approx(history(stock, "loss"), rel=1e-6)
    assert torch.allclose(ours.model.lm_head.weight, stock.model.lm_head.weight, atol=1e-6)


def test_evaluation_is_the_stock_models(tmp_path: Path) -> None:
    run = trainer(tiny_llama(), tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    gradients = make_selective(run, SAMPLED)
    run.train()
    last = history(run, "eval_loss")[-1]
    gradients.detach()
    assert trainer(run.model, tmp_path).evaluate()["eval_loss"] == last


@pytest.mark.parametrize("engine", ["exact", "sparse"])
def test_a_resumed_run_has_the_uninterrupted_ones_losses(tmp_path: Path, engine: Any) -> None:
    config = GradientConfig(engine=engine, ratio=0.3, warmup_steps=4, dense_first=1, dense_every=5)
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    options |= {"gradient_accumulation_steps": 2, "learning_rate": 0.01, "data": rows(40)}

    def run(folder: str) -> Any:
        callbacks = [SelectiveTraining(config)]
        return trainer(tiny_llama(), tmp_path / folder, callbacks=callbacks, **options)

    whole = run("whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    resumed = run("cut")
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed, "loss") == history(whole, "loss") and len(history(whole, "loss")) == 8
    ratios = history(whole, PREFIX + "ratio")
    assert history(resumed, PREFIX + "ratio")[3:] == ratios[3:]
    assert ratios[0] == ratios[5] == 1.0 and ratios[7] < 0.5


class Reports(TrainerCallback):
    """As those that report to TensorBoard: made before any that a user gives."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        self.seen.append(dict(logs))


def test_the_log_says_what_was_trained_since_the_last(tmp_path: Path) -> None:
    reports = Reports()
    run = trainer(tiny_llama(), tmp_path, max_steps=4, logging_steps=2, callbacks=[reports])
    gradients = make_selective(run, HARDEST)
    run.train()
    selected = history(run, PREFIX + "tokens_selected")
    # Two rows a step, in order: k is the ceiling of .4 of each row's labelled tokens.
    assert selected == [3 + 5 + 2 + 4, 1 + 4 + 3 + 5]
    assert [one[PREFIX + "tokens_selected"] for one in reports.seen if "loss" in one] == selected
    assert sum(selected) == gradients.totals()["tokens_selected"]
    assert min(history(run, PREFIX + "loss_unselected")) > 0
    assert not any(PREFIX in key for entry in run.state.log_history[-1:] for key in entry)


def test_the_parts_of_the_first_step_are_one_step(tmp_path: Path) -> None:
    config = GradientConfig(engine="exact", selection="uniform", ratio=0.5, warmup_steps=2)
    run = trainer(tiny_llama(), tmp_path, max_steps=3, gradient_accumulation_steps=3)
    make_selective(run, config)
    make_selective(run)  # once more is no more
    run.train()
    assert history(run, PREFIX + "ratio")[0] == 1.0
    assert found_steps(run) == 3


def found_steps(run: Any) -> int:
    return int(run.model.pliant.gradients.selector.schedule.steps)


def test_the_mixin_is_the_same_as_the_line(tmp_path: Path) -> None:
    class Selective(SelectiveMixin, Trainer):
        pass

    mixed = trainer(tiny_llama(), tmp_path, kind=Selective, max_steps=2, selective=SAMPLED)
    mixed.train()
    plain = trainer(tiny_llama(), tmp_path, max_steps=2)
    make_selective(plain, SAMPLED)
    plain.train()
    assert history(mixed, "loss") == history(plain, "loss")
    assert mixed.gradients.totals() == plain.model.pliant.gradients.totals()


def test_a_loss_that_is_computed_past_the_model_is_refused_or_said(tmp_path: Path) -> None:
    smoothed = trainer(tiny_llama(), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(InvalidInput, match=r"label_smoothing_factor = 0.1"):
        make_selective(smoothed, EVERY)
    smoothed.add_callback(SelectiveTraining(EVERY))
    with pytest.raises(InvalidInput, match=r"label_smoothing_factor = 0.1"):
        smoothed.train()
    own = trainer(tiny_llama(), tmp_path)
    own.compute_loss_func = lambda outputs, labels, **_: outputs.logits.float().mean()
    with pytest.raises(InvalidInput, match="compute_loss_func"):
        make_selective(own, EVERY)
    own.add_callback(SelectiveTraining(EVERY))
    with pytest.warns(GradientsWarning, match="trained without labels"):
        own.train()


def test_a_forward_that_took_our_place_is_noticed_and_gone_around(tmp_path: Path) -> None:
    """As Liger's does when training starts: the loss of every token, by the decoder itself."""
    model, batch = tiny_llama().train(), padded(rows(3))
    plain = tiny_llama().train()
    attach(plain, HARDEST)
    gradients = attach(model, HARDEST)

    def fused(input_ids: Any, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        decoded = model.model(input_ids, attention_mask=attention_mask)
        logits = model.lm_head(decoded.last_hidden_state)
        loss = None if labels is None else model.loss_function(logits, labels, 64)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    model.forward = fused
    with pytest.warns(GradientsWarning, match="trained without its forward"):
        model(**batch)
    put_outside(gradients)
    assert model(**batch).loss.item() == pytest.approx(plain(**batch).loss.item(), rel=1e-6)
    assert model(**batch).logits.shape == plain(**batch).logits.shape


def test_what_is_attached_stays_and_another_configuration_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    gradients = attach(model, HARDEST)
    run = trainer(model, tmp_path)
    assert make_selective(run) is gradients
    with pytest.raises(InvalidInput, match="already trains by"):
        make_selective(trainer(model, tmp_path), EVERY)


@pytest.mark.parametrize("engine", ["exact", "sparse"])
def test_lora_learns_from_the_chosen_tokens(tmp_path: Path, engine: Any) -> None:
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    batch = padded(rows(4))
    model.train()
    hardest_by_hand(model, batch, ratio=0.4).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert wanted and all("lora" in name for name in wanted)
    model.zero_grad()
    attach(model, GradientConfig(engine=engine, selection="topk", score="loss", ratio=0.4))
    model(**batch).loss.backward()
    for name, grad in wanted.items():
        # Detached keys and values cost the earlier layers some of their gradient, but the last
        # layer's queries none.
        if engine == "exact" or "layers.1.self_attn.q_proj" in name:
            assert torch.allclose(dict(model.named_parameters())[name].grad, grad, atol=1e-6), name
    run = trainer(model, tmp_path, max_steps=2)
    make_selective(run)
    run.train()
    assert len(history(run, "loss")) == 2


def hardest_by_hand(model: nn.Module, batch: dict[str, torch.Tensor], ratio: float) -> torch.Tensor:
    """The mean of each row's hardest losses, rows weighed by their labelled tokens."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    total, count = torch.zeros(()), 0
    for logits_TV, labels_T in zip(logits[:, :-1], batch["labels"][:, 1:], strict=True):
        known = labels_T != -100
        losses = nn.functional.cross_entropy(logits_TV[known], labels_T[known], reduction="none")
        k = -(-int(ratio * 1000 * len(losses)) // 1000)
        total, count = total + losses.topk(k).values.mean() * len(losses), count + len(losses)
    return total / count


def test_gradient_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        run = trainer(tiny_llama(), tmp_path, max_steps=3, gradient_checkpointing=on)
        gradients = make_selective(run, SAMPLED)
        run.train()
        assert gradients.engine == "sparse"
        found.append((history(run, "loss"), run.model.lm_head.weight.detach()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_two_processes_have_the_gradient_of_one(tmp_path: Path, root: Path) -> None:
    run_two("tests.gradients.two_processes", str(tmp_path), cwd=root)
    first, second = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2))
    assert first.keys() == second.keys() and len(first) > 20
    assert all(first.values()) and all(second.values()), (first, second)


@pytest.mark.parametrize("engine", ["exact", "sparse"])
def test_compiled_layers_give_the_same_without_a_break(engine: Any) -> None:
    from torch._dynamo import reset, utils

    config = GradientConfig(engine=engine, selection="topk", ratio=0.4)
    found = []
    reset()
    utils.counters.clear()
    for compiled in (False, True):
        model = tiny_llama().train()
        gradients = attach(model, config)
        for layer in model.model.layers if compiled else ():
            layer.compile(backend="eager")
        loss = model(**padded(rows(3))).loss
        loss.backward()
        assert gradients.engine == engine
        found.append((loss.item(), model.model.layers[0].mlp.up_proj.weight.grad))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert utils.counters["stats"]["unique_graphs"] >= 1 and not utils.counters["graph_break"]
