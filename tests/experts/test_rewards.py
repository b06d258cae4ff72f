"""A reward is a weighted sum of parts, in trl's form, that survives what its parts do."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pliant.errors import InvalidInput
from pliant.experts.reward_parts import RewardPart
from pliant.experts.rewards import Reward, RewardWarning
from pliant.verify import Exact, Judge, UnitTests, verifier


def length(answer: str) -> int:
    return len(answer)


def test_a_reward_is_a_weighted_sum() -> None:
    reward = Reward("exact=0.8", "contains=0.2", RewardPart(length, -0.5))
    assert reward.score(["4", "4 cows", "no"], ["4"] * 3) == [0.5, -2.8, -1.0]
    assert reward.means == pytest.approx({"exact": 1 / 3, "contains": 2 / 3, "length": 3})
    assert str(reward) == "0.8 exact + 0.2 contains + -0.5 length: 3 answers, none failed"


def test_verifiers_and_functions_are_parts_with_weight_one() -> None:
    def starts(answer: str, reference: str, prompt: str | None) -> bool:
        return answer.startswith(prompt or "-")

    reward = Reward(Exact(ignore_case=True), starts)
    assert reward.score(["YES", "no"], ["yes", "yes"], ["Y", None]) == [2.0, 0.0]


def test_trl_calls_it_with_texts() -> None:
    reward = Reward("numeric")
    rewards = reward(
        prompts=["1 + 1?", "2 + 2?"],
        completions=["It is 2", "It is 5"],
        completion_ids=[[1], [2]],
        answer=["2", "4"],
        trainer_state=object(),
        log_extra=print,
    )
    assert rewards == [1.0, 0.0]
    assert reward.__name__ == "reward"


def test_trl_calls_it_with_conversations() -> None:
    seen: list[Any] = []
    parts = [{"type": "text", "text": "2 +"}, {"type": "image"}, {"type": "text", "text": " 2?"}]
    prompts = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]]
    reward = Reward(lambda answer, reference, prompt: seen.append((answer, prompt)) or 1)
    assert reward(prompts=prompts, completions=[[{"role": "assistant", "content": "4"}]]) == [1.0]
    assert reward(completions=[[{"role": "assistant", "content": None}]]) == [1.0]
    assert seen == [("4", "Be brief.\n\n2 + 2?"), ("", None)]


def test_a_function_in_trls_form_is_a_part() -> None:
    def ours(completions: list[str], level: list[int], **rest: Any) -> list[float | None]:
        assert rest["prompts"] == ["p", "q"] and "trainer_state" in rest
        return [len(text) * factor for text, factor in zip(completions, level, strict=True)]

    def narrow(completions: list[str]) -> Any:
        return torch.tensor([1.0] * len(completions))

    reward = Reward(RewardPart(ours, 0.5), narrow)
    columns: dict[str, Any] = {"level": [1, 2], "trainer_state": None}
    assert reward(["p", "q"], completions=["ab", "abc"], **columns) == [2.0, 4.0]


def test_code_is_rewarded_by_its_rows_tests() -> None:
    reward = Reward(UnitTests())
    rewards = reward(
        prompts=["def double(x):\n"] * 2,
        completions=["    return 2 * x\n", "    return x\n"],
        test=["def check(f):\n    assert f(2) == 4\n"] * 2,
        entry_point=["double"] * 2,
    )
    assert rewards == [1.0, 0.0]
    assert reward.score(["x = 1", "x = 2"], ["assert x == 1"] * 2) == [1.0, 0.0]
    assert reward.failures == {}


# --- parts that fail -----------------------------------------------------------------------------


def raises(answer: str) -> float:
    raise KeyError(answer)


def leaves(answer: str) -> float:
    raise SystemExit


def hangs(answer: str) -> float:
    threading.Event().wait()
    return 1.0


def loops(answer: str) -> float:
    while True:
        pass


FAILURES = {
    "raised KeyError": raises,
    "raised SystemExit": leaves,
    "timed out": hangs,
    "returned None": lambda answer: None,
    "returned NaN": lambda answer: math.nan,
    "returned infinity": lambda answer: torch.tensor(-math.inf),
    "returned str": lambda answer: "1.0",
    "returned list": lambda answer: [1.0],
    "returned Tensor": lambda answer: torch.zeros(2),
}
TOO_LARGE = {"int": 10**400, "float": 1e300}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_part_that_fails_is_counted_and_survived(kind: str) -> None:
    part = RewardPart(FAILURES[kind], 2.0, "mine")
    reward = Reward("exact", part, seconds=0.05)
    with pytest.warns(RewardWarning, match=f"reward mine {kind}.* counts as 0"):
        assert reward.score(["4", "5"], ["4", "4"]) == [1.0, 0.0]
    assert reward.failures == {"mine": {kind: 2}}
    assert reward.as_dict()["failures"] == reward.failures
    assert f"2 x mine {kind}" in str(reward)


def test_a_loop_is_interrupted() -> None:
    with pytest.warns(RewardWarning, match="timed out"):
        assert Reward(loops, seconds=0.05).score(["a"]) == [0.0]


def test_a_loop_is_interrupted_on_another_thread_too() -> None:
    rewards: list[float] = []
    reward = Reward(loops, seconds=0.05)
    thread = threading.Thread(target=lambda: rewards.extend(reward.score(["a"])))
    with pytest.warns(RewardWarning, match="timed out"):
        thread.start()
        thread.join()
    assert rewards == [0.0]


@pytest.mark.parametrize("value", TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_number_that_float32_cannot_hold_is_infinity(value: float) -> None:
    with pytest.warns(RewardWarning, match="returned infinity"):
        assert Reward(lambda answer: value).score(["a"]) == [0.0]


def test_a_sum_that_float32_cannot_hold_is_a_failure() -> None:
    reward = Reward(RewardPart(lambda answer: 1e38, 100.0, "huge"))
    with pytest.warns(RewardWarning, match="sum returned infinity"):
        assert reward.score(["a"]) == [0.0]


def test_the_caller_says_what_a_failure_counts_as() -> None:
    reward = Reward(RewardPart(raises, 2.0), on_failure=-1)
    with pytest.warns(RewardWarning, match="counts as -1"):
        assert reward.score(["a"]) == [-2.0]


def test_each_kind_is_warned_of_once(recwarn: pytest.WarningsRecorder) -> None:
    reward = Reward(raises)
    for _ in range(3):
        reward.score(["a", "b"])
    assert len([w for w in recwarn if w.category is RewardWarning]) == 1
    assert reward.failures == {"raises": {"raised KeyError": 6}}
    assert reward.as_dict()["first_failures"] == {"raises raised KeyError": "'a'"}


def test_a_batch_that_fails_fails_for_each_answer() -> None:
    for function, kind in (
        (lambda completions: 1 / 0, "raised ZeroDivisionError"),
        (lambda completions: [1.0], "returned no list of one value an answer"),
        (lambda completions: 1.0, "returned no list of one value an answer"),
        (lambda completions: [None, 1.0], "returned None"),
    ):
        reward = Reward(RewardPart(function, label="mine"))
        with pytest.warns(RewardWarning, match=kind):
            assert sum(reward.score(["a", "b"])) in (0.0, 1.0)
        assert reward.failures["mine"][kind] == (1 if kind == "returned None" else 2)


def test_a_judge_without_a_verdict_and_a_broken_reference_are_failures() -> None:
    reward = Reward(Judge(lambda text: "hm"), "numeric")
    with (
        pytest.warns(RewardWarning, match="no verdict"),
        pytest.warns(RewardWarning, match="raised InvalidInput"),
    ):
        assert reward.score(["4", "5"], ["4", "four"]) == [1.0, 0.0]
    assert reward.failures == {"judge": {"no verdict": 2}, "numeric": {"raised InvalidInput": 1}}


@given(st.lists(st.floats() | st.integers() | st.none() | st.text(max_size=2), max_size=5))
@pytest.mark.filterwarnings("ignore::pliant.experts.rewards.RewardWarning")
def test_rewards_are_finite_whatever_a_function_returns(values: list[Any]) -> None:
    reward = Reward(lambda answer: values[int(answer)])
    rewards = reward.score([str(i) for i in range(len(values))])
    assert len(rewards) == len(values)
    assert torch.tensor(rewards, dtype=torch.float32).isfinite().all()
    failed = sum(sum(kinds.values()) for kinds in reward.failures.values())
    numbers = [v for v in values if isinstance(v, (int, float)) and abs(v) <= 3.4e38]
    assert failed == len(values) - len(numbers)


# --- settings that are wrong ---------------------------------------------------------------------


def test_a_reward_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidInput, match="at least one part"):
        Reward()
    with pytest.raises(InvalidInput, match="all weights of the reward are 0"):
        Reward("exact=0", "contains=0")
    with pytest.raises(InvalidInput, match="two parts of the reward are called 'exact'"):
        Reward("exact=0.5", "exact=0.5")
    for wrong in ({"on_failure": math.nan}, {"seconds": 0}, {"concurrency": 0}):
        with pytest.raises(InvalidInput, match="give a"):
            Reward("exact", **wrong)


def test_a_task_without_the_column_is_refused() -> None:
    reward = Reward("numeric", "regex=0.1:pattern=<b>,match_only=true", length)
    with pytest.raises(InvalidInput, match="numeric needs the column 'answer'; there are: label"):
        reward(completions=["4"], label=["4"])
    with pytest.raises(InvalidInput, match="'test' or 'answer'"):
        Reward(UnitTests()).check(["prompt", "tests"])
    reward.check(["prompt", "answer"])
    Reward("numeric", answer_column="label").check(["label"])
    assert Reward("regex:pattern=<b>,match_only=true", length)(completions=["<b>"]) == [4.0]
    assert reward.failures == {}


def test_lists_of_other_lengths_are_refused() -> None:
    with pytest.raises(InvalidInput, match="2 answers and 1 references"):
        Reward("exact").score(["a", "b"], ["a"])
    with pytest.raises(InvalidInput, match="1 prompts and 2 completions"):
        Reward("exact").score(["a", "b"], ["a", "b"], ["p"])
    with pytest.raises(InvalidInput, match="neither a text nor a list of messages"):
        Reward("exact")(completions=[3], answer=["3"])
    assert Reward("exact").score([], []) == []


def test_a_reward_model_that_is_not_there_is_an_error_and_no_failure() -> None:
    reward = Reward(verifier("reward_model", model="./nowhere"))
    with pytest.raises(Exception, match="reward_model"):
        reward.score(["a"])
