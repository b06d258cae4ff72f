"""A capability: a question about a model, and a check that runs something to answer it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass

from transformers.utils import logging

from pliant.errors import PliantError
from pliant.survey.specimen import Specimen


@dataclass(frozen=True)
class Verdict:
    """An answer; `reason` says why not, or on which condition."""

    ok: bool
    reason: str = ""


YES = Verdict(True)


def yes_if(holds: bool, otherwise: str) -> Verdict:
    """Yes, or no with the reason."""
    return YES if holds else Verdict(False, otherwise)


Check = Callable[[Specimen], Verdict]


PARTS = ("foundation", "complexity", "structure", "experts", "gradients")


@dataclass(frozen=True)
class Capability:
    """One column of docs/architectures.md."""

    part: str
    """The part of Pliant that needs it: one of PARTS."""
    name: str
    question: str
    check: Check
    needs: tuple[str, ...] = ()
    """Capabilities that this one depends on; if one is missing, its reason counts here, too."""


CAPABILITIES: list[Capability] = []


def register(part: str, name: str, needs: Sequence[str] = ()) -> Callable[[Check], Check]:
    """Make the decorated check a capability, after those that it needs.

    The first paragraph of its docstring is the question.
    """

    def decorate(check: Check) -> Check:
        names = [capability.name for capability in CAPABILITIES]
        assert name not in names and set(needs) <= set(names) and part in PARTS, name
        question = " ".join((check.__doc__ or "").partition("\n\n")[0].split())
        CAPABILITIES.append(Capability(part, name, question, check, tuple(needs)))
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
