"""Asking a router's models: the first that answers, or all of them; and which of them are up."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from pliant.errors import PliantError
from pliant.routing.backends import Answers, Backend, BackendError, Settings
from pliant.routing.backends.remote import in_parallel
from pliant.routing.live.preference import Breakers
from pliant.routing.prompts import Prompt
from pliant.routing.router_file import RouterFile


@dataclass(frozen=True)
class FirstAnswer:
    """Of the models in an order, what the first that answered said."""

    model: str
    answers: Answers
    failures: tuple[str, ...]
    """Of the models before it."""
    refused: frozenset[str]
    """The models that are well and refused this prompt: they would refuse what follows as well."""


class Asking:
    """The backends of a router's models, and for prompts that fit one model only, patient ones."""

    def __init__(
        self,
        file: RouterFile,
        backends: Mapping[str, Backend],
        breakers: Breakers,
        device: str | None = None,
    ) -> None:
        self._file, self._breakers = file, breakers
        self.backends = {
            entry.name: backends.get(entry.name) or entry.open(device) for entry in file.models
        }
        # Opening a backend sends nothing.
        self._patient = {
            entry.name: entry.open(patient=True)
            for entry in file.models
            if entry.name not in backends and entry.is_remote
        }

    def settings(self, score: float | None, options: Mapping[str, Any]) -> Settings:
        """How a prompt of this score is answered: as the caller says, else as the file does."""
        settings = Settings(seed=secrets.randbelow(2**31))
        bands = self._file.settings
        band = next((b for b in bands if score is not None and score <= b.up_to), None)
        if band is not None:
            settings = band.over(settings)
        if options.get("temperature") == 0 and "samples" not in options:
            settings = replace(settings, samples=1)
        return replace(settings, **options)

    def first_answer(
        self, prompt: Prompt, order: Sequence[str], settings: Settings, alone: bool
    ) -> FirstAnswer:
        """Ask one model after the other; those that are down come last.

        `alone` says that no other model takes the prompt, so that a URL is tried again.
        """
        left = list(order)
        failures: list[str] = []
        refused: set[str] = set()
        for last_resort in (False, True):
            for name in list(left):
                if not last_resort and not self._breakers.enter(name):
                    continue
                left.remove(name)
                try:
                    answers = self._ask(name, prompt, settings, alone)
                except PliantError as error:
                    failures.append(str(error))
                    if getattr(error, "prompts_fault", False):
                        refused.add(name)
                    continue
                return FirstAnswer(name, answers, tuple(failures), frozenset(refused))
        raise BackendError(f"no model answered: {'; '.join(failures)}", "unreachable")

    def each(
        self, prompt: Prompt, names: Sequence[str], settings: Settings
    ) -> tuple[dict[str, Answers], list[str]]:
        """Ask these models at the same time, those that are up: their answers, and the failures."""
        up = [name for name in names if self._breakers.enter(name)]
        failures = [f"{name} is down" for name in names if name not in up]
        answered: dict[str, Answers] = {}

        def ask(name: str) -> Answers | Exception:
            try:
                return self._ask(name, prompt, settings, alone=False)
            except Exception as error:  # whatever it is, the caller has an answer already
                return error

        with closing(in_parallel(ask, up, len(up))) as results:
            for at, result in results:
                if isinstance(result, Answers):
                    answered[up[at]] = result
                else:
                    failures.append(str(result))
        return answered, failures

    def close(self) -> None:
        for backend in (*self.backends.values(), *self._patient.values()):
            backend.close()

    def _ask(self, name: str, prompt: Prompt, settings: Settings, alone: bool) -> Answers:
        backend = (self._patient if alone else self.backends).get(name, self.backends[name])
        try:
            ((_, answers),) = backend.ask([prompt], settings)
            if not isinstance(answers, Answers):
                raise answers
        except BackendError as error:
            if error.prompts_fault:  # the model is well
                self._breakers.succeeded(name)
            else:
                self._breakers.failed(name)
            raise
        except PliantError:  # it cannot even be loaded
            self._breakers.failed(name)
            raise
        self._breakers.succeeded(name)
        return answers
