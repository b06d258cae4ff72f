"""Under trl's trainers, which go past the forward: only chosen tokens are trained all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tests.gradients.test_training import HARDEST, hardest_by_hand, history
from tests.minimal_adapter import tiny_llama

from pliant.errors import InvalidInput
from pliant.gradients import GradientConfig, GradientsWarning, attach
from pliant.loading import load_tokenizer

trl = pytest.importorskip("trl", minversion="1.16")

ROWS = [
    {"prompt": "2 + 3 =", "completion": " 5, as everybody knows"},
    {"prompt": "the longest of all, by far:", "completion": " no"},
    {"prompt": "a", "completion": " b c d e f g"},
    {"prompt": "one", "completion": " two three four"},
]
UNIFORM = GradientConfig(engine="exact", selection="uniform", ratio=0.5)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("nano-s")


def small_model(tokenizer: Any) -> Any:
    return tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=128)


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    common: dict[str, Any] = {"output_dir": str(folder), "max_steps": 1, "logging_steps": 1}
    common |= {"per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, "report_to": []}
    common |= {"gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no"}
    return {**common, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0, **changes}


def sft(folder: Path, tokenizer: Any, kind: Any, *, on: Any = None, **selective: Any) -> Any:
    from datasets import Dataset

    return kind(
        on or small_model(tokenizer),
        trl.SFTConfig(**options(folder), lr_scheduler_type="constant"),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        **selective,
    )


def gradients_of(run: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The gradient at the logits' rows, before the head: of every position's hidden state."""
    kept: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.retain_grad()
            kept.append(output.last_hidden_state)

    run.model.train()
    handle = run.model.model.register_forward_hook(keep)
    run.compute_loss(run.model, dict(batch)).backward()
    handle.remove()
    return kept[0].grad.abs().sum(-1)


def test_sft_trains_the_chosen_tokens_alone(tmp_path: Path, tokenizer: Any) -> None:
    from pliant.gradients.trl import SelectiveSFTTrainer

    config = GradientConfig(engine="exact", selection="topk", score="loss", ratio=0.4)
    run = sft(tmp_path, tokenizer, SelectiveSFTTrainer, selective=config)
    batch = next(iter(run.get_train_dataloader()))
    touched = gradients_of(run, batch) > 0
    labelled = batch["labels"][:, 1:] != -100
    wanted = [-(-2 * int(row.sum()) // 5) for row in labelled]
    assert touched.sum(1).tolist() == wanted and not touched[:, :-1][~labelled].any()
    run.model.zero_grad()
    run.compute_loss(run.model, dict(batch)).backward()
    ours = [p.grad.clone() for p in run.model.parameters()]
    run.gradients.detach()
    run.model.zero_grad()
    hardest_by_hand(run.model, batch, ratio=0.4).backward()
    for mine, p in zip(ours, run.model.parameters(), strict=True):
        assert torch.allclose(mine, p.grad, atol=1e-6)


def test_sft_logs_the_loss_of_all_tokens_and_what_was_trained(
    tmp_path: Path, tokenizer: Any
) -> None:
    from pliant.gradients.trl import SelectiveSFTTrainer

    stock = sft(tmp_path, tokenizer, trl.SFTTrainer)
    stock.train()
    run = sft(tmp_path, tokenizer, SelectiveSFTTrainer, selective=HARDEST)
    run.train()
    for key in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
        assert history(run, key) == pytest.approx(history(stock, key), rel=1e-5), key
    assert 0.4 <= history(run, "gradients/ratio")[0] < 0.6
    moved = torch.equal(run.model.lm_head.weight, stock.model.lm_head.weight)
    assert not moved and run.gradients.selector.schedule.steps == 1


@pytest.mark.parametrize("engine", ["exact", "sparse"])
def test_at_ratio_one_sft_is_trls_own(tmp_path: Path, tokenizer: Any, engine: Any) -> None:
    from pliant.gradients.trl import SelectiveSFTTrainer

    stock = sft(tmp_path, tokenizer, trl.SFTTrainer)
    stock.train()
    every = GradientConfig(engine=engine, ratio=1.0)
    run = sft(tmp_path, tokenizer, SelectiveSFTTrainer, selective=every)
    run.train()
    assert torch.allclose(run.model.lm_head.weight, stock.model.lm_head.weight, atol=1e-6)


def test_attached_alone_it_is_gone_past_and_says_so(tmp_path: Path, tokenizer: Any) -> None:
    some = small_model(tokenizer)
    gradients = attach(some, HARDEST)
    run = sft(tmp_path, tokenizer, trl.SFTTrainer, on=some)
    with pytest.warns(GradientsWarning, match="trained without its forward.*SelectiveMixin"):
        run.train()
    assert gradients.metrics() == {}


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(text) % 5) for text in completions]


def policy(
    folder: Path, tokenizer: Any, kind: Any, config: Any = None, lora: Any = None, **changes: Any
) -> Any:
    """A trainer of GRPO's kind, or of RLOO's; `kind` is trl's own, or the selective one."""
    from datasets import Dataset

    settings = trl.GRPOConfig if "GRPO" in kind.__name__ else trl.RLOOConfig
    plain: dict[str, Any] = {"num_generations": 4, "max_completion_length": 10, "beta": 0.0}
    torch.manual_seed(0)
    return kind(
        small_model(tokenizer),
        reward,
        args=settings(**options(folder, **plain | changes)),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
        processing_class=tokenizer,
        peft_config=lora,
        **({} if config is None else {"selective": config}),
    )


@pytest.mark.parametrize("name", ["SelectiveGRPOTrainer", "SelectiveRLOOTrainer"])
def test_a_policys_gradient_is_the_whole_one_on_average(
    tmp_path: Path, tokenizer: Any, name: str
) -> None:
    from pliant.gradients import trl as selective

    run = policy(tmp_path, tokenizer, getattr(selective, name), UNIFORM)
    run.model.train()
    run.current_gradient_accumulation_steps = 1  # what its train() sets
    batch = run._prepare_inputs(next(iter(run.get_train_dataloader())))
    head = run.model.lm_head.weight

    def gradient() -> torch.Tensor:
        run.model.zero_grad()
        run.compute_loss(run.model, batch).backward()
        return head.grad.clone()

    touched = gradients_of(run, batch) > 0
    labelled = batch["completion_mask"].sum(1)
    paid = batch["advantages"] != 0
    assert paid.any() and touched.sum(1)[paid].tolist() == (-(-labelled // 2))[paid].tolist()
    with run.gradients.disabled():
        dense = gradient()
    draws = torch.stack([gradient() for _ in range(150)])
    off = (draws.mean(0) - dense).norm()
    spread = (draws - dense).flatten(1).norm(dim=1).square().mean().sqrt()
    assert off < 3 * spread / len(draws) ** 0.5 and spread > 0.1 * dense.norm()


def test_rloo_trains_and_what_it_logs_is_of_all_tokens(tmp_path: Path, tokenizer: Any) -> None:
    from pliant.gradients.trl import SelectiveRLOOTrainer

    stock = policy(tmp_path, tokenizer, trl.RLOOTrainer, max_steps=2)
    stock.train()
    run = policy(tmp_path, tokenizer, SelectiveRLOOTrainer, HARDEST, max_steps=2)
    run.train()
    for key in ("loss", "entropy", "reward", "completions/mean_length"):
        assert history(run, key)[0] == pytest.approx(history(stock, key)[0], rel=1e-5), key
    weights = [one.model.lm_head.weight.detach() for one in (run, stock)]
    assert not torch.equal(*weights) and not torch.equal(
        weights[0], small_model(tokenizer).lm_head.weight
    )
    assert 0.4 <= history(run, "gradients/ratio")[0] < 0.6
    assert run.gradients.selector.schedule.steps == 2


def test_grpo_trains_and_its_loss_is_made_of_true_values(tmp_path: Path, tokenizer: Any) -> None:
    scored = GradientConfig(engine="sparse", ratio=0.4)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    from pliant.gradients.trl import SelectiveGRPOTrainer

    kind = SelectiveGRPOTrainer
    run = policy(tmp_path, tokenizer, kind, scored, lora, beta=0.1, max_steps=2)
    run.train()
    # At first the reference is the policy itself: were the values not true, they would differ.
    assert history(run, "kl")[0] == pytest.approx(0.0, abs=1e-6)
    learned = [p for name, p in run.model.named_parameters() if "lora_B" in name]
    assert run.gradients.engine == "sparse" and any(bool(p.any()) for p in learned)
    assert 0.4 <= history(run, "gradients/ratio")[0] < 0.7


def test_dpo_trains_the_chosen_tokens_of_both(tmp_path: Path, tokenizer: Any) -> None:
    from datasets import Dataset

    from pliant.gradients.trl import SelectiveDPOTrainer

    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " x y"} for r in ROWS]
    run = SelectiveDPOTrainer(
        small_model(tokenizer),
        ref_model=small_model(tokenizer),
        args=trl.DPOConfig(**options(tmp_path)),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        selective=UNIFORM,
    )
    run.train()
    assert history(run, "loss")[0] == pytest.approx(0.6931, abs=1e-3)
    figures = run.gradients.totals()
    assert 0.5 <= figures["tokens_selected"] / figures["tokens_total"] < 0.7


def kto(folder: Path, tokenizer: Any, kind: Any, *, on: Any = None, **selective: Any) -> Any:
    from datasets import Dataset

    judged = [{**row, "label": i % 2 == 0} for i, row in enumerate(ROWS)]
    return kind(
        on or small_model(tokenizer),
        ref_model=small_model(tokenizer),
        args=trl.KTOConfig(**options(folder)),
        train_dataset=Dataset.from_list(judged),
        processing_class=tokenizer,
        **selective,
    )


def test_kto_trains_the_chosen_tokens_and_weighs_by_the_values_of_all(
    tmp_path: Path, tokenizer: Any
) -> None:
    from pliant.gradients.trl import SelectiveKTOTrainer

    stock = kto(tmp_path, tokenizer, trl.KTOTrainer)
    stock.train()
    run = kto(tmp_path, tokenizer, SelectiveKTOTrainer, selective=UNIFORM)
    batch = next(iter(run.get_train_dataloader()))
    touched = gradients_of(run, batch) > 0
    labelled = batch["completion_mask"][:, 1:] != 0
    assert touched.sum(1).tolist() == (-(-labelled.sum(1) // 2)).tolist()
    assert not touched[:, :-1][~labelled].any()
    run.train()
    for key in ("loss", "rewards/chosen", "logps/rejected", "kl"):
        assert history(run, key) == pytest.approx(history(stock, key), rel=1e-5, abs=1e-6), key
    assert not torch.equal(run.model.lm_head.weight, stock.model.lm_head.weight)


def test_under_kto_attached_alone_it_is_gone_past_and_says_so(
    tmp_path: Path, tokenizer: Any
) -> None:
    some = small_model(tokenizer)
    gradients = attach(some, HARDEST)
    run = kto(tmp_path, tokenizer, trl.KTOTrainer, on=some)
    with pytest.warns(GradientsWarning, match="trained without its forward"):
        run.train()
    assert gradients.metrics() == {}


def test_weights_of_tokens_are_no_matter_of_trls(tmp_path: Path, tokenizer: Any) -> None:
    run = sft(tmp_path, tokenizer, trl.SFTTrainer)
    attach(run.model, UNIFORM)
    run.model.train()
    batch = next(iter(run.get_train_dataloader()))
    with pytest.raises(InvalidInput, match="loss_weights"):
        run.model(**batch, loss_weights=torch.ones(4), fused_lm_head=True)
