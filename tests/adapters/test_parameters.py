"""`Within`: a parameter is another while a module runs, in one thread, and stays what it is."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pliant.adapters import Adapter, Wire, Within, attach
from pliant.errors import AdapterError

MAY_RUN = threading.Event()
MAY_RUN.set()


class Stack(nn.Module):
    """Computes with a bare parameter, as stacked experts do."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(2, 3, 4, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        MAY_RUN.wait(timeout=30)
        return torch.einsum("be,edf->bdf", x, self.weight)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.stack = Stack()

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.stack(self.embed(ids))
        return y


@dataclass(frozen=True)
class Empty:
    pass


class Times(Adapter):
    part = "minimal"
    config_class = Empty

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__(model, Empty())
        self.factor = nn.Parameter(torch.tensor(factor))

    def wire(self, model: nn.Module) -> Iterator[Wire]:
        stack = model.get_submodule("stack")
        yield Within(stack, stack, "weight", self.scale)

    def scale(self, weight: Tensor) -> Tensor:
        return weight * self.factor


IDS = torch.tensor([0, 2])


def model() -> Any:
    torch.manual_seed(0)
    return Model()


def test_it_acts_inside_forward_alone_and_comes_off() -> None:
    base = model()
    before, weight, kind = base(IDS), base.stack.weight, type(base.stack)
    keys = list(vars(base.stack))
    adapter = attach(base, Times(base, 3.0))
    assert torch.equal(base(IDS), torch.einsum("be,edf->bdf", base.embed(IDS), 3 * weight))
    assert base.stack.weight is weight and dict(base.named_parameters())["stack.weight"] is weight
    assert "stack.weight" in base.state_dict()
    base(IDS).sum().backward()
    assert adapter.factor.grad is not None and weight.grad is not None
    with adapter.disabled():
        assert torch.equal(base(IDS), before)
    adapter.detach()
    assert type(base.stack) is kind and list(vars(base.stack)) == keys
    assert torch.equal(base(IDS), before)


def test_two_adapters_multiply_and_leave_in_either_order() -> None:
    for first, second in ((0, 1), (1, 0)):
        base = model()
        before = base(IDS)
        both = [attach(base, Times(base, f), f"times_{f:.0f}") for f in (3.0, 2.0)]
        assert torch.allclose(base(IDS), 6 * before)
        both[first].detach()
        assert torch.allclose(base(IDS), (2, 3)[first] * before)
        both[second].detach()
        assert torch.equal(base(IDS), before) and type(base.stack) is Stack


def test_an_error_in_forward_leaves_nothing_behind() -> None:
    base = model()
    attach(base, Times(base, 3.0))
    with pytest.raises(RuntimeError):
        base.stack(torch.zeros(1, 5))
    assert torch.equal(base.stack.weight, base.state_dict()["stack.weight"])


def test_another_thread_that_switched_it_off_does_not_see_it() -> None:
    """Also while this thread is inside the same module's forward."""
    base = model()
    before = base(IDS)
    adapter = attach(base, Times(base, 3.0))
    MAY_RUN.clear()
    results: dict[str, Tensor] = {}

    def run(name: str, off: bool) -> None:
        if off:
            with adapter.disabled():
                results[name] = base(IDS)
        else:
            results[name] = base(IDS)

    threads = [threading.Thread(target=run, args=(str(off), off)) for off in (False, True)]
    for thread in threads:
        thread.start()
    MAY_RUN.set()
    for thread in threads:
        thread.join()
    assert torch.equal(results["True"], before) and torch.allclose(results["False"], 3 * before)


def test_a_copy_of_the_model_has_its_own() -> None:
    base = model()
    before = base(IDS)
    attach(base, Times(base, 3.0))
    copied = copy.deepcopy(base)
    with torch.no_grad():
        copied.pliant.minimal.factor.fill_(2)
    assert torch.allclose(base(IDS), 3 * before) and torch.allclose(copied(IDS), 2 * before)
    copied.pliant.minimal.detach()
    assert type(copied.stack) is Stack and torch.allclose(base(IDS), 3 * before)


def test_a_parametrization_that_would_hide_it_is_refused() -> None:
    """As of a LoRA on a bare parameter."""
    base = model()
    attach(base, Times(base, 3.0))

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    parametrize.register_parametrization(base.stack, "weight", Half(), unsafe=True)
    with pytest.raises(AdapterError, match="parametrized since"):
        base(IDS)
