"""A model is tried out once in each state, and the trial changes nothing."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import nn

from pliant import Anatomy
from pliant.anatomy.tiny import tiny_model
from pliant.anatomy.trial import is_close, trial_ids, verdict


class Trial:
    """Counts its calls."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.calls, self.training = model, 0, False

    def __call__(self) -> bool:
        self.calls, self.training = self.calls + 1, self.model.training
        torch.rand(3)
        assert not torch.is_grad_enabled()
        return True


def failed(reason: str) -> bool:
    return False


def test_a_trial_runs_once_for_each_state_of_a_model() -> None:
    model = tiny_model("llama")
    trial = Trial(model)
    for _ in range(3):
        assert verdict(model, "a question", trial, failed)
    assert trial.calls == 1
    verdict(model, "another question", trial, failed)
    assert trial.calls == 2
    verdict(tiny_model("llama"), "a question", trial, failed)
    assert trial.calls == 3
    verdict(model.train(), "a question", trial, failed)
    assert (trial.calls, trial.training) == (4, True)
    model.add_module("new", nn.Dropout(0.5))
    verdict(model, "a question", trial, failed)
    assert trial.calls == 5
    verdict(model.bfloat16(), "a question", trial, failed)
    assert trial.calls == 6


def test_a_trial_in_eval_mode_restores_the_mode_and_ignores_it() -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    trial = Trial(model)
    verdict(model, "a question", trial, failed, in_eval_mode=True)
    assert not trial.training and model.training and not model.model.layers[0].training
    verdict(model.eval(), "a question", trial, failed, in_eval_mode=True)
    assert trial.calls == 1


def test_random_numbers_stay_the_same() -> None:
    model = tiny_model("llama")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    verdict(model, "a question", Trial(model), failed)
    assert torch.rand(4).equal(expected)


def test_a_failure_is_a_verdict_but_out_of_memory_is_not() -> None:
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


def test_threads_that_ask_at_the_same_time_share_one_trial() -> None:
    model, calls = tiny_model("llama"), []

    def slow() -> bool:
        calls.append(1)
        time.sleep(0.05)
        return True

    ask = threading.Barrier(4)

    def run() -> None:
        ask.wait()
        verdict(model, "a question", slow, failed)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]


def test_trial_ids_are_ordinary_tokens() -> None:
    ids = trial_ids(Anatomy.of(tiny_model("llama")), 20)
    assert ids.shape == (2, 20) and ids.min() >= 64 and ids.max() < 192


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_rounding_is_close_and_a_fault_is_not(dtype: torch.dtype, off: float) -> None:
    model, reference = tiny_model("llama", dtype=dtype), torch.ones(8)
    assert is_close(model, reference + off / 100, reference)
    assert not is_close(model, reference + off, reference)
    assert not is_close(model, reference * float("nan"), reference)
