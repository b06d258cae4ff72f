"""A model behind a URL is the judge of an answer, for grading and for rewards."""

from __future__ import annotations

import pytest
from tests.routing.chat_server import chat_server

from pliant.errors import InvalidInput
from pliant.experts.rewards import Reward, RewardWarning
from pliant.routing.backends import BackendError
from pliant.routing.judge import open_judge
from pliant.verify import Judge


def test_a_model_behind_a_url_judges() -> None:
    """The server answers in capitals what it is asked: the last verdict counts."""
    with chat_server() as server:
        ask = open_judge(f"openai:j@{server.url}")
        judge = Judge(ask, template="{answer} verdict: {reference}")
        assert (judge("4", "right"), judge("4", "wrong")) == (1.0, 0.0)
        assert [body["model"] for body in server.bodies] == ["j", "j"]


def test_a_judge_is_a_part_of_a_reward() -> None:
    with chat_server() as server:
        line = f"judge=0.5:model=openai:j@{server.url},template={{answer}} verdict: {{reference}}"
        reward = Reward("exact", line, open_judge=open_judge)
        assert reward.score(["right", "wrong"], ["right", "right"]) == [1.5, 0.5]


def test_a_server_that_fails_is_an_error_and_in_a_reward_a_failure() -> None:
    with chat_server([401, 401, 401]) as server:
        with pytest.raises(BackendError, match="401"):
            open_judge(f"openai:j@{server.url}")("text")
        reward = Reward(f"judge:model=openai:j@{server.url}", open_judge=open_judge)
        with pytest.warns(RewardWarning, match="raised BackendError"):
            assert reward.score(["4", "5"], ["4", "4"]) == [0.0, 0.0]
        assert list(reward.failures.values()) == [{"raised BackendError": 2}]


def test_a_judge_that_is_not_written_right_is_refused_before_any_call() -> None:
    with pytest.raises(InvalidInput, match="openai:MODEL@https://host/v1"):
        Reward("judge:model=openai:j", open_judge=open_judge)
