"""A capability: a question about a model, and a check that answers it on a tiny copy."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from pliant.anatomy import Anatomy
from pliant.anatomy.depth import DepthProof, prove_depth
from pliant.anatomy.tiny import tiny_model
from pliant.errors import PliantError

PARTS = ("foundation", "complexity", "structure", "experts", "gradients")
LENGTH = 12  # tokens of a specimen's prompts


@dataclass(frozen=True)
class Verdict:
    """An answer; `reason` says why not, or on which condition."""

    ok: bool
    reason: str = ""


YES = Verdict(True)


def yes_if(holds: bool, otherwise: str) -> Verdict:
    """Yes, or no with the reason."""
    return YES if holds else Verdict(False, otherwise)


Check = Callable[["Specimen"], Verdict]


@dataclass(frozen=True)
class Capability:
    """One column of docs/architectures.md."""

    part: str
    """The part of Pliant that needs it: one of PARTS."""
    name: str
    question: str
    check: Check
    exactly: str = ""
    """What is tried, as exactly as a sentence can say it."""
    needs: tuple[str, ...] = ()
    """Capabilities that this one depends on; if one is missing, its reason counts here, too."""


CAPABILITIES: list[Capability] = []


def register(part: str, name: str, needs: Sequence[str] = ()) -> Callable[[Check], Check]:
    """Make the decorated check a capability, after those that it needs.

    The first paragraph of its docstring is the question in plain words, the second what is tried.
    """

    def decorate(check: Check) -> Check:
        names = [capability.name for capability in CAPABILITIES]
        assert name not in names and set(needs) <= set(names) and part in PARTS, name
        paragraphs = [" ".join(text.split()) for text in (check.__doc__ or "").split("\n\n")]
        question, exactly = (*paragraphs, "")[:2]
        CAPABILITIES.append(Capability(part, name, question, check, exactly, tuple(needs)))
        return check

    return decorate


def by_part() -> list[Capability]:
    """All capabilities in the order of the page: those of one part together."""
    return sorted(CAPABILITIES, key=lambda capability: PARTS.index(capability.part))


def ask(specimen: Specimen, capabilities: Iterable[Capability] | None = None) -> dict[str, Verdict]:
    """The answer to each capability, in the order of registration."""
    answers: dict[str, Verdict] = {}
    with _quiet():
        for capability in CAPABILITIES if capabilities is None else capabilities:
            needed = (answers[need] for need in capability.needs if need in answers)
            refusal = next((answer for answer in needed if not answer.ok), None)
            answers[capability.name] = refusal or _answer(capability, specimen)
    return answers


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence models: some warn about missing kernels, and Reformer prints to stdout."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _answer(capability: Capability, specimen: Specimen) -> Verdict:
    """The check's answer; an error of the model is a no, and its reason."""
    try:
        return capability.check(specimen)
    except PliantError as error:
        return Verdict(False, str(error))
    except Exception as error:
        name, message = type(error).__name__, " ".join(str(error).split())[:200]
        return Verdict(False, f"{name}: {message}" if message else name)


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
        _without_fast_experts(double.model)
        return double

    @cached_property
    def rounding(self) -> float:
        """How far fp32 is from fp64 with the same weights, relative to the largest logit."""
        double = _without_fast_experts(deepcopy(self.model).double())
        with torch.no_grad(), Fp64Throughout():
            exact = double(input_ids=self.ids, use_cache=False).logits
        return float((self.run() - exact).abs().max() / exact.abs().max())

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
        ids = self.ids if ids is None else ids
        logits: Tensor = self.model(input_ids=ids, use_cache=False, **inputs).logits
        return logits

    def run_hooked(self, *hooks: tuple[nn.Module, Callable[..., Any]]) -> Tensor:
        """The logits with forward pre-hooks on some modules."""
        with ExitStack() as stack:
            for module, hook in hooks:
                stack.enter_context(module.register_forward_pre_hook(hook))
            return self.run()


def _without_fast_experts(model: Any) -> Any:
    """The same model; the fast experts of a mixture have no fp64 kernel."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


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
