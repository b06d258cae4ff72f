"""trl's trainers with an expert: what they sample, score and compare it with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.experts.training.runs import lower_half, rollouts, set_z, trainer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from trl import GRPOTrainer

from pliant.errors import InvalidInput
from pliant.experts.model import svf_layers
from pliant.experts.rewards import Reward, RewardWarning
from pliant.experts.training.trainer import SafeReward

METHODS = ("grpo", "rloo", "reinforce")
KINDS = ("ids", "mask")


@torch.no_grad()
def by_hand(model: Any, answers: dict[str, Any], temperature: float) -> list[Tensor]:
    """The log-probability of each token of each answer, one row at a time, without padding."""
    rows = []
    for i in range(len(answers["prompt_ids"])):
        prompt = answers["prompt_ids"][i][answers["prompt_mask"][i].bool()]
        answer = answers["completion_ids"][i][answers["completion_mask"][i].bool()]
        ids = torch.cat([prompt, answer])[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        log_p = (logits / temperature).log_softmax(-1)
        rows.append(log_p.gather(1, answer[:, None])[:, 0])
    return rows


def of_trl(run: Any, answers: dict[str, Any]) -> list[Tensor]:
    """The same as the trainer computes it, in one padded batch."""
    ids = torch.cat([answers["prompt_ids"], answers["completion_ids"]], dim=1)
    mask = torch.cat([answers["prompt_mask"], answers["completion_mask"]], dim=1)
    length = answers["completion_ids"].shape[1]
    with torch.no_grad():
        log_p, *_ = run._get_per_token_logps_and_entropies(run.model, ids, mask, length)
    return [row[m.bool()] for row, m in zip(log_p, answers["completion_mask"], strict=True)]


@pytest.mark.parametrize(("form", "temperature"), [("folded", 1.0), ("delta", 0.7)])
def test_the_log_probabilities_are_those_of_the_tokens_that_were_sampled(
    tmp_path: Path, form: str, temperature: float
) -> None:
    run = trainer(tmp_path, temperature=temperature, max_new_tokens=12)
    set_z(run.model)
    answers = rollouts(run)
    for _, layer in svf_layers(run.model):
        layer.form = form
    ours, theirs = by_hand(run.model, answers, temperature), of_trl(run, answers)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


class TestSharedPrompts:
    """Each prompt runs once for the log-probabilities of all its answers."""

    @pytest.mark.parametrize("form", ["folded", "delta"])
    def test_values_and_gradients_are_those_of_a_forward_for_each_answer(
        self, tmp_path: Path, form: str
    ) -> None:
        run = trainer(tmp_path, max_new_tokens=5)
        set_z(run.model)
        for _, layer in svf_layers(run.model):
            layer.form = form
        inputs = _shuffled(rollouts(run))
        outputs = []
        for method in (type(run), GRPOTrainer):
            log_p, entropy, _ = method._get_per_token_logps_and_entropies(
                run, run.model, *inputs, 5, compute_entropy=True
            )
            run.model.zero_grad()
            log_p.sum().backward()
            gradient = torch.cat([p.grad for p in run.model.parameters() if p.requires_grad])
            outputs.append((log_p.detach(), entropy, gradient))
        for ours, theirs in zip(*outputs, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4) and ours.any()

    def test_each_prompt_runs_once(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, max_new_tokens=5)
        ids, mask = _shuffled(rollouts(run))
        seen = []
        embeddings = run.model.get_input_embeddings()
        handle = embeddings.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        run._get_per_token_logps_and_entropies(run.model, ids, mask, 5)
        handle.remove()
        assert [len(ids) for ids in seen] == [4, 16] and seen[1].shape[1] == 5 + 1

    def test_positions_are_those_of_the_answers_sampling(self, tmp_path: Path) -> None:
        """Also where padded prompts stand at absolute positions, which trl counts as tokens."""
        config = GPT2Config(
            vocab_size=260, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4
        )
        base = GPT2LMHeadModel(config).eval()
        run = trainer(tmp_path, base=base)
        answers = rollouts(run)
        assert not answers["prompt_mask"].all()
        ours, theirs = by_hand(run.model, answers, 1.0), of_trl(run, answers)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))

    def test_without_a_group_in_common_every_answer_runs_its_own(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, max_new_tokens=5)
        inputs = [t[::4] for t in _together(rollouts(run))]
        ours, theirs = (
            method._get_per_token_logps_and_entropies(run, run.model, *inputs, 5)[0]
            for method in (type(run), GRPOTrainer)
        )
        assert torch.equal(ours, theirs)


def _together(answers: dict[str, Any]) -> list[Tensor]:
    parts = [[answers[f"{part}_{kind}"] for part in ("prompt", "completion")] for kind in KINDS]
    return [torch.cat(part, dim=1) for part in parts]


def _shuffled(answers: dict[str, Any]) -> list[Tensor]:
    """As trl has them when a batch is divided: the groups' answers are not side by side."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    return [t[order] for t in _together(answers)]


def test_an_answer_keeps_its_token_ids_up_to_its_end(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    def reward(completion_ids: Any, **_: Any) -> list[float]:
        seen.extend(completion_ids)
        return lower_half(completion_ids)

    run = trainer(tmp_path, reward=reward, max_new_tokens=40, temperature=2.0)
    run.eos_token_ids = list(range(200, 258))  # so that many answers end
    answers = rollouts(run)
    ids, mask = answers["completion_ids"], answers["completion_mask"].bool()
    assert [row[m].tolist() for row, m in zip(ids, mask, strict=True)] == seen
    lengths = [len(answer) for answer in seen]
    assert min(lengths) < max(lengths)  # so some are padded
    ended = [answer for answer in seen if len(answer) < 40]
    assert ended and all(answer[-1] >= 200 for answer in ended)
    assert all(token < 200 for answer in seen for token in answer[:-1])
    assert (ids[~mask] == 256).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_is_the_expert_disabled(tmp_path: Path, method: str) -> None:
    run = trainer(tmp_path, method=method, beta=0.1)
    assert run.ref_model is None and "ref" not in run.model.peft_config
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert trained and all(".svf_z." in name for name in trained)


def test_kl_is_0_at_first_and_that_of_the_tokens_afterwards(tmp_path: Path) -> None:
    run = trainer(tmp_path, beta=0.1)

    def kl() -> tuple[float, float]:
        answers = rollouts(run)
        run.compute_loss(run.model, answers)
        policy = torch.cat(by_hand(run.model, answers, 1.0))
        with run.model.disable_adapter():
            base = torch.cat(by_hand(run.model, answers, 1.0))
        ratio = base - policy
        return run._metrics["train"]["kl"][-1], float((ratio.exp() - ratio - 1).mean())

    assert kl() == pytest.approx((0.0, 0.0), abs=1e-6)
    set_z(run.model)
    measured, expected = kl()
    assert measured == pytest.approx(expected, rel=1e-3) and measured > 0.1


def test_reinforce_takes_each_answers_own_reward(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, method="reinforce", reward=lambda completions: [1.0, 0.0, None, 0.5] * 4
    )
    assert rollouts(run)["advantages"].tolist() == [1.0, -1.0, 0.0, 0.0] * 4


def test_reinforces_gradient_is_that_of_the_published_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path, method="reinforce", beta=0.0, max_new_tokens=5)
    run.eos_token_ids = [257]
    answers = rollouts(run)
    run.compute_loss(run.model, answers).backward()
    ours = torch.cat([p.grad for p in run.model.parameters() if p.requires_grad])
    run.model.zero_grad()
    mask = answers["completion_mask"]
    ids = torch.cat([answers["prompt_ids"], answers["completion_ids"]], dim=1)
    whole = torch.cat([answers["prompt_mask"], mask], dim=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    logits = run.model(input_ids=ids, attention_mask=whole, position_ids=positions).logits
    log_p = logits[:, -mask.shape[1] - 1 : -1].log_softmax(-1)
    log_p = log_p.gather(2, answers["completion_ids"][..., None])[..., 0]
    (-(answers["advantages"][:, None] * log_p * mask).sum() / mask.sum()).backward()
    by_hand = torch.cat([p.grad for p in run.model.parameters() if p.requires_grad])
    assert torch.allclose(ours, by_hand, atol=1e-5) and by_hand.abs().max() > 1e-3


def test_a_prompts_estimate_comes_from_its_own_answers(tmp_path: Path) -> None:
    def reward(prompts: Any, completions: Any, answer: Any) -> list[float]:
        assert all(p.endswith(f"q{a}") for p, a in zip(prompts, answer, strict=True))
        return [float(int(a) % 2) for a in answer]

    run = trainer(tmp_path, reward=reward)
    for _ in range(8):
        rollouts(run)
    for i, (p, tried) in enumerate(zip(run.prompts.success, run.prompts.tried, strict=True)):
        assert tried == 0 or (p > 0.5) == bool(i % 2)
    assert (run.prompts.tried > 0).sum() > 6


class TestReward:
    def test_what_fails_is_counted(self) -> None:
        def reward(completions: Any) -> list[Any]:
            return [1, math.nan, None, math.inf]

        safe = SafeReward(reward)
        assert safe(completions=["a"] * 4, prompts=["p"] * 4, answer=["x"] * 4) == [1, *[None] * 3]
        assert safe.failures == 3

    @pytest.mark.parametrize("result", [[1.0], "no", None, ["x", "y"]])
    def test_what_is_no_list_of_numbers_is_a_failure(self, result: Any) -> None:
        safe = SafeReward(lambda completions: result)
        with pytest.warns(RewardWarning, match="the reward failed"):
            assert safe(completions=["a", "b"]) == [None, None] and safe.failures == 2

    def test_the_first_error_is_shown(self) -> None:
        def reward(completions: Any) -> Any:
            raise RuntimeError("no such judge")

        safe = SafeReward(reward)
        with pytest.warns(RewardWarning, match="training goes on: RuntimeError: no such judge"):
            assert safe(completions=["a", "b"]) == [None, None]
        assert safe(completions=["c"]) == [None] and safe.failures == 3

    def test_a_reward_that_judges_nothing_ends_the_training(self) -> None:
        works = iter([False, False, True, False, False, False])

        def judge(answer: str) -> float:
            if not next(works):
                raise ConnectionError("no route to the judge")
            return 1.0

        safe = SafeReward(Reward(judge))
        with pytest.warns(RewardWarning, match="no route to the judge"):
            rewards = [safe(prompts=["p"], completions=["a"], answer=["x"]) for _ in range(5)]
        assert rewards == [[0.0], [0.0], [1.0], [0.0], [0.0]]
        with pytest.raises(InvalidInput, match="batches in a row .*no route to the judge"):
            safe(prompts=["p"], completions=["a"], answer=["x"])

    def test_what_a_reward_has_counted_itself_is_included_once(self) -> None:
        def broken(answer: str) -> float:
            return 1 / 0

        reward = Reward(broken)
        with pytest.warns(RewardWarning, match="ZeroDivisionError"):
            reward(["p"], completions=["earlier"], answer=["x"])
        safe = SafeReward(reward)
        assert safe(prompts=["p"] * 2, completions=["a", "b"], answer=["x"] * 2) == [0.0, 0.0]
        assert safe.failures == 2
