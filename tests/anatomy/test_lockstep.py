"""All batches wait at each layer; the outputs are those of separate runs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.minimal_adapter import tiny_llama

from pliant.anatomy import Anatomy
from pliant.anatomy.lockstep import LayerCall, run_in_lockstep
from pliant.anatomy.tiny import tiny_model


def batches(count: int = 3) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5 + i) for i in range(count)]
    return [
        {"input_ids": torch.randint(5, 60, s, generator=generator), "use_cache": False}
        for s in shapes
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3n_text", "mixtral"])
def test_every_layer_gets_what_it_gets_in_a_run_of_its_own(name: str) -> None:
    model = tiny_model(name)
    anatomy = Anatomy.of(model)
    inputs = batches()
    expected: list[list[torch.Tensor]] = [[] for _ in anatomy.layers]
    for batch in inputs:
        handles = [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, i=i: expected[i].append(
                    args[0] if args else kwargs["hidden_states"]
                ),
                with_kwargs=True,
            )
            for i, layer in enumerate(anatomy.layers)
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
    order: list[int] = []

    def visit(index: int, calls: Sequence[LayerCall]) -> list[Any]:
        order.append(index)
        for call, hidden in zip(calls, expected[index], strict=True):
            assert torch.equal(call.hidden, hidden)
        [call() for call in calls]  # computing it once more changes nothing
        return [call() for call in calls]

    run_in_lockstep(anatomy, inputs, visit)
    assert order == list(range(len(anatomy.layers)))


def test_a_change_of_a_layer_reaches_the_next_one() -> None:
    model = tiny_llama()
    anatomy = Anatomy.of(model)
    seen: list[torch.Tensor] = []

    def visit(index: int, calls: Sequence[LayerCall]) -> list[Any]:
        seen.extend(call.hidden for call in calls)
        return [torch.full_like(call.hidden, index + 1.0) for call in calls]

    run_in_lockstep(anatomy, batches(1), visit)
    assert torch.equal(seen[1], torch.ones_like(seen[1]))


def test_an_error_ends_all_threads_and_is_raised() -> None:
    model = tiny_llama()
    before = threading.active_count()

    def visit(index: int, calls: Sequence[LayerCall]) -> list[Any]:
        raise ValueError("stop here")

    with pytest.raises(ValueError, match="stop here"):
        run_in_lockstep(Anatomy.of(model), batches(), visit)
    assert threading.active_count() == before


def test_an_error_of_the_model_is_raised() -> None:
    model = tiny_llama()
    wrong = [{"input_ids": torch.tensor([[10_000]])}]
    with pytest.raises(IndexError):
        run_in_lockstep(Anatomy.of(model), wrong, lambda index, calls: [call() for call in calls])
