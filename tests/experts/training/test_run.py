"""A training by reward in a folder: what it learns, writes and survives, and how it resumes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from tests.experts.training.runs import config, lower_half, model, tokenizer, trained, z_of
from tests.minimal_adapter import logits
from transformers import TrainerCallback

from pliant.cli.expert.report import _verdict
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.experts.rewards import Reward
from pliant.experts.training import ExpertTrainingConfig
from pliant.experts.training.run import ExpertResult, train_expert
from pliant.experts.training.task import encode, hold_out
from pliant.experts.training.trainer import RewardMixin
from pliant.stats import Band

METHODS = ("grpo", "rloo", "reinforce")


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return z_of(PeftModel.from_pretrained(model(), str(folder)))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_toy_task_is_learned(tmp_path: Path, method: str) -> None:
    base = model(hidden_size=32, intermediate_size=64)
    how: dict[str, Any] = {"steps": 12, "prompts": 8, "group": 8, "max_new_tokens": 1}
    how |= {"learning_rate": 0.1, "schedule": "constant", "beta": 0.0}
    result = trained(tmp_path, base=base, method=method, **how)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rewards = [entry["task_reward"] for entry in log if "task_reward" in entry]
    assert len(rewards) == 12
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.12
    assert result.gain.value > 0 and result.steps == 12 and result.method == method


def test_the_folder_holds_a_small_expert_and_the_model_is_as_it_was(tmp_path: Path) -> None:
    base = model()
    state = {name: p.clone() for name, p in base.state_dict().items()}
    before, forward = logits(base), vars(base).get("forward")
    result = trained(tmp_path, base=base)
    assert torch.equal(logits(base), before) and vars(base).get("forward") is forward
    assert base.state_dict().keys() == state.keys()
    assert all(torch.equal(p, state[name]) for name, p in base.state_dict().items())
    assert all(p.requires_grad for p in base.parameters())
    own = saved(tmp_path)
    assert result.trained == sum(d.numel() for d in own.values())
    assert all(bool(d.any()) for d in own.values())
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 20_000
    assert not list(tmp_path.glob("**/model.safetensors"))


def test_what_was_measured_is_what_was_saved(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def reward(completions: Any, **columns: Any) -> list[float]:
        seen.append(list(completions))
        return lower_half(**columns)

    held_out = [{"prompt": f"other {i}", "answer": "x"} for i in range(3)]
    result = trained(tmp_path, reward, held_out=held_out, steps=8)
    from pliant.experts.training.answers import greedy_answers

    loaded = PeftModel.from_pretrained(model(), str(tmp_path))
    task = encode(held_out, tokenizer(), chat=False)
    ids = greedy_answers(loaded, task.ids, 6, tokenizer())
    assert tokenizer().batch_decode(ids, skip_special_tokens=True) == seen[-1] != seen[0]
    assert result.after.value == pytest.approx(sum(lower_half(ids)) / 3)
    assert result.gain.value == pytest.approx(result.after.value - result.before.value)
    assert (result.held_out, result.shared_prefill) == (3, True)
    assert 0 < result.rollout_share < 1


def test_the_log_is_shown_with_the_share_that_answers_took(tmp_path: Path) -> None:
    lines: list[str] = []
    trained(tmp_path, say=lines.append, steps=2)
    assert lines[0].startswith("training, step 1 of 2: loss ") and "% of the step" in lines[0]
    assert ", reward " in lines[0] and ", KL " in lines[0] and "failed" not in lines[0]


@pytest.mark.parametrize(("layers", "rate"), [(2, None), (4, None), (2, 0.05)])
def test_the_default_learning_rate_falls_with_the_depth(
    tmp_path: Path, layers: int, rate: float | None
) -> None:
    trained(tmp_path, base=model(num_hidden_layers=layers), steps=1, learning_rate=rate)
    log = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert log["learning_rate"] == pytest.approx(rate or 0.02 / layers**0.5)


def test_lora_learns_from_the_same_rollouts(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    result = trained(tmp_path, peft_config=lora, steps=2)
    assert result.trained == 2 * 2 * (16 + 16 + 16 + 32)
    assert (tmp_path / "adapter_model.safetensors").is_file()


# --- a run that ends early -----------------------------------------------------------------------


class Interrupt(TrainerCallback):
    """Ctrl-C, in the middle of the third step."""

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("options", [{"method": "rloo"}, {"updates": 2, "batch_size": 8}])
def test_after_ctrl_c_it_resumes_exactly(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tmp_path / "whole", steps=4, **options)
    init = RewardMixin.__init__

    def interrupted(self: Any, *args: Any, **more: Any) -> None:
        init(self, *args, **more)
        self.add_callback(Interrupt())

    with monkeypatch.context() as patch:
        patch.setattr(RewardMixin, "__init__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "again", base=(base := model()), steps=4, **options)
    assert torch.equal(logits(base), logits(model()))
    assert not (tmp_path / "again" / "adapter_model.safetensors").exists()
    torch.manual_seed(99)  # another process has drawn other numbers
    resumed = trained(tmp_path / "again", resume=True, steps=4, **options)
    assert resumed.resumed_at == 3
    assert same(saved(tmp_path / "again"), saved(tmp_path / "whole"))
    assert (resumed.after, resumed.before) == (whole.after, whole.before)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "again")]
    rewards = [[json.loads(line).get("reward") for line in log] for log in logs]
    assert rewards[0] == rewards[1]


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    trained(tmp_path, steps=2)
    with pytest.raises(InvalidInput, match=r"begun with another config \(learning_rate\)"):
        trained(tmp_path, steps=2, learning_rate=0.01, resume=True)
    with pytest.raises(InvalidInput, match="begun with another reward"):
        trained(tmp_path, lambda completions: [0.0] * len(completions), steps=2, resume=True)
    with pytest.raises(InvalidInput, match="holds a run already"):
        trained(tmp_path, steps=2)


def test_a_finished_run_is_measured_again_and_not_trained(tmp_path: Path) -> None:
    first = trained(tmp_path, steps=2)
    before = saved(tmp_path)
    again = trained(tmp_path, steps=2, resume=True)
    assert again.after == first.after and same(saved(tmp_path), before)


def test_a_reward_that_fails_now_and_then_is_survived(tmp_path: Path) -> None:
    calls: list[int] = []

    def reward(completion_ids: Any, **_: Any) -> list[Any]:
        calls.append(len(completion_ids))
        if len(calls) == 2:
            raise RuntimeError("the judge is away")
        rewards: list[Any] = lower_half(completion_ids)
        return [float("nan"), None, *rewards[2:]] if len(calls) == 3 else rewards

    lines: list[str] = []
    result = trained(tmp_path, reward, steps=4, say=lines.append)
    assert result.reward_failures == 16 + 2 and "18 rewards failed" in lines[-1]
    assert "18 rewards failed" in str(result)
    assert all(torch.isfinite(d).all() and d.any() for d in saved(tmp_path).values())


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ppo"}, "method = 'ppo': give one of grpo, rloo, reinforce"),
        ({"temperature": 0.0}, "temperature = 0.0: give a number above 0"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0: give a number above 0"),
        ({"beta": float("nan")}, "beta = nan: give a number of at least 0"),
        ({"group": 1}, "group = 1: give a whole number, 2 or more"),
        ({"exploration": 1.5}, "exploration = 1.5: give a share from 0 to 1"),
        ({"parts": "head"}, "parts = 'head': give one of all, mlp, attention"),
        ({"steps": 0}, "steps = 0: give a whole number, 1 or more"),
        ({"rank": 0}, "rank = 0: give a whole number, 1 or more"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ExpertTrainingConfig(**options)


def test_a_reporter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="nonesuch"):
        trained(tmp_path / "run", report_to="nonesuch", steps=1)


def test_answers_go_into_forwards_of_equal_size(tmp_path: Path) -> None:
    args = config(prompts=6, group=5, batch_size=8).arguments(tmp_path, use_cpu=True)
    sizes = args.per_device_train_batch_size, args.gradient_accumulation_steps
    assert sizes == (6, 5) and args.generation_batch_size == 30


def test_prompts_share_no_side_of_the_split() -> None:
    rows = [{"prompt": f"Q {i % 10}", "answer": ""} for i in range(40)]
    learned, held_out = hold_out(rows, seed=0)
    assert {r["prompt"] for r in learned}.isdisjoint(r["prompt"] for r in held_out)
    assert len(learned) + len(held_out) == 40 and 4 <= len(held_out) <= 12
    for two in (rows[:2], [rows[0]] * 30 + [rows[1]] * 20):
        learned, held_out = hold_out(two, seed=0)
        assert learned and held_out and learned[0] != held_out[0]
    for few in (rows[:1], [rows[0]] * 5):
        with pytest.raises(InvalidInput):
            hold_out(few, seed=0)


def test_prompts_that_leave_no_space_for_an_answer_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "a" * n, "answer": ""} for n in (3, 125)]
    with pytest.raises(InvalidInput, match="row 2: its prompt has 125 tokens.* at most 122 fit"):
        train_expert(
            model(), tokenizer(), rows, lower_half, config(), folder=tmp_path, held_out=rows
        )
    assert not list(tmp_path.iterdir())


def test_a_reward_needs_its_column_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="exact needs the column 'reference'"):
        trained(tmp_path, Reward("exact", answer_column="reference"))
    with pytest.raises(InvalidInput, match="reward = 'exact': give a Reward, or a function"):
        trained(tmp_path, "exact")
    assert not list(tmp_path.iterdir())


def test_a_wrapped_model_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, steps=1)
    wrapped = PeftModel.from_pretrained(model(), str(tmp_path))
    with pytest.raises(UnsupportedModel, match="the model is wrapped already"):
        trained(tmp_path / "other", base=wrapped)


def test_a_result_claims_no_more_than_its_rows_and_steps_bear(tmp_path: Path) -> None:
    def result(held_out: int, gain: Band, **changes: Any) -> ExpertResult:
        ends: Any = {"first_loss": 0.0, "last_loss": 0.0, "losses": None, "eval_loss": None}
        facts: Any = {"seconds": 1.0, "resumed_at": 0, "method": "grpo", "trained": 9, "kl": None}
        before, after = Band(0.2, 0.1, 0.3), Band(0.2 + gain.value, 0.1, 0.9)
        rewards = {"first_reward": 0.1, "last_reward": 0.4, "rewards": None, **changes}
        measured: Any = {"before": before, "after": after, "gain": gain, "held_out": held_out}
        more: Any = {"rollout_share": 0.5, "shared_prefill": False, "reward_failures": 0}
        return ExpertResult(steps=5, **ends, **facts, **rewards, **measured, **more)

    sure, unsure = Band(0.5, 0.3, 0.7), Band(0.1, -0.1, 0.3)
    assert "raised the held-out reward from 0.200 to 0.700" in str(result(50, sure))
    assert "measurably" in str(result(50, unsure))
    assert "raised" not in str(result(50, unsure))
    assert "held-out rows: 9, too few to tell" in str(result(9, sure))
    cells = dict(map(tuple, result(50, sure).cells()))  # type: ignore[arg-type]
    assert cells["reward of sampled answers"] == "0.400; 5 steps: too few to tell whether it rose"
    assert not any("loss" in name for name in cells), "that of a policy says nothing"
    enough = dict(map(tuple, result(50, sure, rewards=(0.1, 0.4)).cells()))  # type: ignore[arg-type]
    assert enough["reward of sampled answers"] == "0.100 -> 0.400"
    assert "[" in cells["after"] and "[" in cells["gain (paired)"]
    few = result(9, sure)
    assert not any("[" in value for _, value in few.cells()), "an interval claims too much"
    verdicts = [_verdict(r, tmp_path)[0] for r in (few, result(50, unsure), result(50, sure))]
    worse = result(50, Band(-0.1, -0.15, -0.05))
    assert [*verdicts, _verdict(worse, tmp_path)[0]] == ["mixed", "mixed", "good", "bad"]
