"""Handlers run in their own context and inside their block alone, and leave no trace."""

from __future__ import annotations

import contextvars
import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn

from pliant.anatomy.intercept import CALL, FORWARD, intercept


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def zero(original: Any, args: Any, kwargs: Any) -> Any:
    return torch.zeros_like(args[0])


def more_by_one(original: Any, args: Any, kwargs: Any) -> Any:
    return original(*args, **kwargs) + 1


ONE = torch.ones(())


@pytest.mark.parametrize("target", [FORWARD, CALL])
def test_a_handler_replaces_a_module_inside_the_block(target: str) -> None:
    module = Double()
    with intercept({(module, target): zero}):
        assert module(ONE) == 0
    assert module(ONE) == 2


@pytest.mark.parametrize("target", [FORWARD, CALL])
def test_a_handler_can_call_the_module_itself(target: str) -> None:
    module = Double()
    with intercept({(module, target): more_by_one}):
        assert module(ONE) == 3


def test_hooks_run_around_a_forward_and_not_around_a_call() -> None:
    module = Double()
    module.register_forward_hook(lambda _, __, output: output + 10)
    with intercept({(module, FORWARD): zero}):
        assert module(ONE) == 10
    with intercept({(module, CALL): zero}):
        assert module(ONE) == 0


def test_other_contexts_are_unaffected() -> None:
    module = Double()
    elsewhere = contextvars.copy_context()
    with intercept({(module, FORWARD): zero}):
        assert elsewhere.run(module, ONE) == 2


def test_an_inner_block_replaces_the_outer_until_it_ends() -> None:
    module = Double()
    with intercept({(module, FORWARD): zero}):
        with intercept({(module, FORWARD): more_by_one}):
            assert module(ONE) == 3
        assert module(ONE) == 0


@pytest.mark.parametrize("target", [FORWARD, CALL])
def test_an_error_leaves_no_trace(target: str) -> None:
    module = Double()
    before = dict(vars(module))
    with pytest.raises(RuntimeError), intercept({(module, target): zero}):
        raise RuntimeError
    assert vars(module) == before


def test_a_patched_forward_is_restored() -> None:
    module = Double()
    module.forward = lambda x: 5 * x
    replaced = module.forward
    with intercept({(module, FORWARD): more_by_one}):
        assert module(ONE) == 6
    assert module.forward is replaced


def test_a_forward_patched_inside_the_block_stays_patched() -> None:
    module = Double()
    with intercept({(module, FORWARD): zero}):
        inner = module.forward
        module.forward = lambda x: inner(x) + 7
        assert module(ONE) == 7
    assert module(ONE) == 9
    with intercept({(module, FORWARD): zero}):
        assert module(ONE) == 0
    assert module(ONE) == 9


def test_overlapping_blocks_end_in_any_order() -> None:
    module = Double()
    first, second = (
        intercept({(module, FORWARD): zero}),
        intercept({(module, FORWARD): more_by_one}),
    )
    one, other = contextvars.copy_context(), contextvars.copy_context()
    one.run(first.__enter__)
    other.run(second.__enter__)
    one.run(first.__exit__, None, None, None)
    assert other.run(module, ONE) == 3
    other.run(second.__exit__, None, None, None)
    assert "forward" not in vars(module)


def test_a_copy_of_the_module_is_not_intercepted() -> None:
    module = Double()
    with intercept({(module, CALL): zero}):
        twin = copy.deepcopy(module)
        assert twin(ONE) == 2


def test_it_has_the_signature_of_the_original() -> None:
    """`generate` passes the arguments in a forward's signature: positions, logits_to_keep, ..."""
    module = Double()
    own = inspect.signature(module.forward)
    with intercept({(module, FORWARD): zero}):
        assert inspect.signature(module.forward) == own
