"""A tiny model under examination, with inputs and its outputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pliant.anatomy import Anatomy
from pliant.anatomy.depth import DepthProof, prove_depth
from pliant.anatomy.tiny import tiny_model

LENGTH = 12


class Specimen:
    """A tiny model of a type or of a config, built on first use."""

    def __init__(self, of: Any, dtype: torch.dtype = torch.float32):
        self.of = of
        self.dtype = dtype

    @cached_property
    def model(self) -> Any:
        return tiny_model(self.of, dtype=self.dtype)

    @cached_property
    def anatomy(self) -> Anatomy:
        return Anatomy.of(self.model)

    @cached_property
    def in_fp64(self) -> Specimen:
        """The same model in fp64: run it under `Fp64Throughout`."""
        double = Specimen(self.of, torch.float64)
        double.model.double()  # some parts ignore the dtype and are built in fp32
        if hasattr(double.model, "set_experts_implementation"):
            double.model.set_experts_implementation("eager")  # the fast one has no fp64 kernel
        return double

    @cached_property
    def depth(self) -> DepthProof:
        """Whether it can be stopped at half depth and resumed."""
        return prove_depth(self.anatomy, self.ids)

    @cached_property
    def ids(self) -> Tensor:
        """Two prompts of ordinary tokens; special ones are at both ends of a tiny vocabulary."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(5, 100, (2, LENGTH), generator=generator)

    @cached_property
    def logits(self) -> Tensor:
        """The unchanged model's logits."""
        return self.run()

    @torch.no_grad()
    def run(self, ids: Tensor | None = None, **inputs: Any) -> Tensor:
        """The logits on these ids, without a cache, which not every model has."""
        inputs.setdefault("use_cache", False)
        logits: Tensor = self.model(input_ids=self.ids if ids is None else ids, **inputs).logits
        return logits

    def run_hooked(self, *hooks: tuple[nn.Module, Callable[..., Any]]) -> Tensor:
        """The logits with forward pre-hooks on some modules."""
        with ExitStack() as stack:
            for module, hook in hooks:
                stack.enter_context(module.register_forward_pre_hook(hook))
            return self.run()


class Fp64Throughout(TorchFunctionMode):
    """Stays in fp64 where a model's code casts to fp32 for precision.

    The rounding of fp32 would hide whether two ways of computing a number are the same: it differs
    from one CPU to the next, and a tolerance that allows it allows small faults too.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            func, args = Tensor.double, args[:1]
        elif func in (Tensor.to, Tensor.type) or "dtype" in kwargs:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)
