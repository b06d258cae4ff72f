"""Prompts are drawn by how much they have to teach."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from pliant.errors import InvalidInput
from pliant.experts.training.prompts import PromptSampler


def after(rewards: list[list[float]], times: int = 1, **options: float) -> PromptSampler:
    """Prompt i was answered with the rewards of row i, so many times."""
    sampler = PromptSampler(len(rewards), **options)  # type: ignore[arg-type]
    for _ in range(times):
        sampler.update(range(len(rewards)), rewards)
    return sampler


def test_prompts_whose_answers_differ_are_drawn_most() -> None:
    sampler = after([[1] * 8, [0] * 8, [0, 1] * 4, [1] * 7 + [0]], times=3)
    counts = Counter(i for _ in range(2000) for i in sampler.draw(1))
    assert counts[2] > counts[3] > counts[0] > 0 and counts[3] > counts[1] > 0
    assert counts[2] > 4 * counts[0]
    expected = 2000 * sampler.weights
    assert all(abs(counts[i] - expected[i]) < 4 * expected[i] ** 0.5 for i in range(4))


def test_a_prompt_that_was_never_tried_is_worth_most() -> None:
    sampler = PromptSampler(3)
    sampler.update([0, 1], [[1] * 7 + [0], [0] * 8])
    assert sampler.success[2] == 0.5 and sampler.weights.argmax() == 2


def test_success_lies_between_the_lowest_and_the_highest_reward() -> None:
    ours = after([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
    theirs = after([[3, -5, 3, -5], [3, 3, 3, 3], [-5, -5, -5, 3]])
    assert np.allclose(ours.success, theirs.success)


def test_old_answers_fade() -> None:
    sampler = after([[0] * 8], times=10)
    sampler.update([0], [[1] * 8])
    before = sampler.success[0]
    for _ in range(4):
        sampler.update([0], [[1] * 8])
    assert sampler.success[0] > 0.75 > before


def test_rewards_that_failed_count_as_no_answer() -> None:
    sampler = after([[1, 0, float("nan"), float("nan")], [float("nan")] * 4])
    assert sampler.tried.tolist() == [2, 0] and np.isfinite(sampler.weights).all()


def test_all_rewards_equal_leave_the_draws_even() -> None:
    assert np.allclose(after([[1] * 4, [1] * 4]).weights, 0.5)
    assert np.allclose(after([[0, 1], [1, 1]], exploration=1.0).weights, 0.5)


def test_a_draw_repeats_no_prompt_until_all_are_drawn() -> None:
    sampler = PromptSampler(5)
    assert sorted(sampler.draw(5)) == [0, 1, 2, 3, 4]
    assert max(Counter(sampler.draw(8)).values()) == 2


def test_the_draws_follow_from_the_seed_and_the_rewards() -> None:
    def run(sampler: PromptSampler, steps: int) -> list[list[int]]:
        drawn = []
        for _ in range(steps):
            drawn.append(sampler.draw(3))
            sampler.update(drawn[-1], [[i % 2, 1, i % 3 == 0] for i in drawn[-1]])
        return drawn

    whole = run(PromptSampler(9, seed=4), 6)
    first = PromptSampler(9, seed=4)
    assert run(first, 2) == whole[:2]
    resumed = PromptSampler(9, seed=4)
    resumed.load_state(json.loads(json.dumps(first.state())))
    assert run(resumed, 4) == whole[2:]
    assert run(PromptSampler(9, seed=5), 6) != whole
    with pytest.raises(InvalidInput, match="the checkpoint has 9 prompts, and the task has 8"):
        PromptSampler(8).load_state(first.state())
