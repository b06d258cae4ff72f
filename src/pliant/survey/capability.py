"""A capability: a question about a model, with a check that runs something to answer it."""

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
    """An answer; `reason` says why not, or under which condition."""

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
    """Capabilities without which this one cannot be: their reasons are its reasons."""


CAPABILITIES: list[Capability] = []


def register(
    part: str, name: str, question: str, needs: Sequence[str] = ()
) -> Callable[[Check], Check]:
    """Make the decorated check a capability; its needs must be registered before it."""

    def decorate(check: Check) -> Check:
        known = [capability.name for capability in CAPABILITIES]
        assert name not in known and set(needs) <= set(known) and part in PARTS, name
        CAPABILITIES.append(Capability(part, name, question, check, tuple(needs)))
        return check

    return decorate


def by_part() -> list[Capability]:
    """All capabilities in the order in which they are shown: those of a part together."""
    return sorted(CAPABILITIES, key=lambda capability: PARTS.index(capability.part))


def ask(specimen: Specimen, capabilities: Iterable[Capability] | None = None) -> dict[str, Verdict]:
    """The answers, by capability; what is asked for is asked in the order of registration."""
    answers: dict[str, Verdict] = {}
    with _quiet():
        for capability in CAPABILITIES if capabilities is None else capabilities:
            lacking = (answers[need] for need in capability.needs if need in answers)
            refusal = next((answer for answer in lacking if not answer.ok), None)
            answers[capability.name] = refusal or _checked(capability, specimen)
    return answers


@contextmanager
def _quiet() -> Iterator[None]:
    """Models remark on kernels that are not installed; Reformer prints to where JSON may go."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _checked(capability: Capability, specimen: Specimen) -> Verdict:
    """A check that fails on an error of the model's answers with that error."""
    try:
        return capability.check(specimen)
    except PliantError as error:
        return Verdict(False, str(error))
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        return Verdict(False, f"{type(error).__name__}: {said}" if said else type(error).__name__)
