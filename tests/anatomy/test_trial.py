"""A model is tried out once for each state that it is in, and is afterwards as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pliant import Anatomy
from pliant.anatomy.tiny import tiny_model
from pliant.anatomy.trial import is_close, trial_ids, verdict


class Asked:
    """Counts how often it is asked."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.times, self.training = model, 0, False

    def __call__(self) -> bool:
        self.times, self.training = self.times + 1, self.model.training
        torch.rand(3)
        assert not torch.is_grad_enabled()
        return True


def no(reason: str) -> bool:
    return False


def test_a_question_is_asked_once_for_each_state_of_a_model() -> None:
    model = tiny_model("llama")
    ask = Asked(model)
    for _ in range(3):
        assert verdict(model, "a question", ask, no)
    assert ask.times == 1
    verdict(model, "another question", ask, no)
    assert ask.times == 2
    verdict(tiny_model("llama"), "a question", ask, no)
    assert ask.times == 3
    verdict(model.train(), "a question", ask, no)
    assert (ask.times, ask.training) == (4, True)
    model.add_module("new", nn.Dropout(0.5))
    verdict(model, "a question", ask, no)
    assert ask.times == 5
    verdict(model.bfloat16(), "a question", ask, no)
    assert ask.times == 6


def test_in_eval_mode_the_mode_makes_no_difference_and_comes_back() -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    ask = Asked(model)
    verdict(model, "a question", ask, no, in_eval_mode=True)
    assert not ask.training and model.training and not model.model.layers[0].training
    verdict(model.eval(), "a question", ask, no, in_eval_mode=True)
    assert ask.times == 1


def test_random_numbers_are_as_before() -> None:
    model = tiny_model("llama")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    verdict(model, "a question", Asked(model), no)
    assert torch.rand(4).equal(expected)


def test_a_failure_is_an_answer_and_running_out_of_memory_is_none() -> None:
    model = tiny_model("llama")

    def broken() -> str:
        raise ValueError("no such  thing\nhere")

    assert verdict(model, "a question", broken, str) == "ValueError: no such thing here"
    assert verdict(model, "a question", lambda: "fine", str) == "ValueError: no such thing here"

    def exhausted() -> str:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        verdict(model, "memory", exhausted, str)
    assert verdict(model, "memory", lambda: "fine", str) == "fine"


def test_trial_ids_are_ordinary_tokens() -> None:
    ids = trial_ids(Anatomy.of(tiny_model("llama")), 20)
    assert ids.shape == (2, 20) and ids.min() >= 64 and ids.max() < 192


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_rounding_is_forgiven_and_a_fault_is_not(dtype: torch.dtype, off: float) -> None:
    model, reference = tiny_model("llama", dtype=dtype), torch.ones(8)
    assert is_close(model, reference + off / 100, reference)
    assert not is_close(model, reference + off, reference)
    assert not is_close(model, reference * float("nan"), reference)
