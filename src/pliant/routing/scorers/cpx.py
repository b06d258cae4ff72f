"""The [CPX] token as a router's scorer: what the base itself makes of the prompt.

Its capacity is chosen on the choice split among a few, each trained on the training split alone;
the one that is chosen is then trained on both. benchmarks/routing_nano.py measures it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt, digest, text_of
from pliant.routing.scorers.base import Base, named
from pliant.routing.scorers.fitting import Floats, best, gain_error, together
from pliant.routing.scorers.protocol import (
    Predictions,
    Scorer,
    State,
    over_the_first,
    read_state,
)

if TYPE_CHECKING:
    from pliant.complexity import Complexity, Scores
    from pliant.routing.live.shared_prefill import Prefilling

_ADAPTER = "cpx"
"""The folder of the trained scorer, inside of ours."""


@dataclass(frozen=True)
class Capacity:
    """How much a scorer can learn."""

    rows: int = 1
    lora_rank: int = 8
    layer: int | None = None
    """Read after so many layers; None reads the last."""

    def __str__(self) -> str:
        layer = "" if self.layer is None else f", layer {self.layer}"
        return f"{self.rows} row{'s' * (self.rows > 1)}, LoRA rank {self.lora_rank}{layer}"


CAPACITIES = (Capacity(1, 0), Capacity(1, 4), Capacity(1, 8), Capacity(4, 8))


_ROOM, _SAMPLE = 8e9, 8
"""Bytes of keys and values that are held in memory, estimated from so many of the longest."""
_MOST_FOR_CHOOSING = 8_000
"""Training rows that the candidates of a choice see."""


class Cpx(Scorer):
    """One output a model, the probability that it is right; the gain is their difference."""

    kind = "cpx"

    def __init__(
        self,
        base: Base | str | None = None,
        capacities: Sequence[Capacity] = CAPACITIES,
        epochs: int = 6,
        batch_size: int = 32,
        learning_rate: float = 1e-2,
        weight_decay: float = 0.1,
    ) -> None:
        self.given, self.capacities = base, tuple(capacities)
        # How it learns was chosen on development questions of the nano world.
        self.lesson: dict[str, Any] = {
            "num_epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
        }
        self.capacity = self.capacities[-1]
        self.errors: dict[str, float] = {}
        """Of each candidate on the choice split, the mean squared error of the gain."""
        self.models: tuple[str, ...] = ()
        self.scorer: Complexity | None = None
        self._known: _Known | None = None

    @property
    def base(self) -> Base:
        """The model that is read."""
        self.given = named(self.kind, self.given)
        return self.given

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        everything = together(train, choice)
        with self.remembering(everything):
            if choice is not None:
                self.choose(train, choice, seed)
            return self.learn(everything, seed)

    @contextmanager
    def remembering(self, outcomes: Outcomes) -> Iterator[None]:
        """Compute the prompts' keys and values once for all trainings inside, where they are few
        enough for memory; else each training decides by itself."""
        self._known = _Known(self.base, outcomes.asked)
        try:
            yield
        finally:
            self._known = None

    def choose(self, train: Outcomes, choice: Outcomes, seed: int = 0) -> None:
        """Find the capacity that, learned on `train`, is best on `choice`."""
        if len(self.capacities) == 1:
            return
        few = train.select(np.arange(min(len(train), _MOST_FOR_CHOOSING)))

        def error(capacity: Capacity) -> float:
            self._train(few, capacity, seed)
            return gain_error(self.predict(choice.asked).gain, choice)

        self.capacity, self.errors = best(self.capacities, error)

    def learn(self, outcomes: Outcomes, seed: int = 0) -> Self:
        """Train at the capacity that was chosen."""
        self.models = outcomes.models
        self._train(outcomes, self.capacity, seed)
        return self

    def predict(
        self, prompts: Sequence[Prompt], groups: Sequence[str] | None = None
    ) -> Predictions:
        assert self.scorer is not None, "not fitted"
        return _told(self.scorer.score(self.base.framed(prompts)))

    def while_answering(self, prompt: Prompt) -> Prefilling:
        """The same, from the prefill of the base's own answer to one prompt."""
        from pliant.routing.live.shared_prefill import Prefilling

        assert self.scorer is not None, "not fitted"
        return Prefilling(self.scorer, _told)

    def flops(self, prompts: Sequence[Prompt]) -> float:
        return self.base.reading_flops(prompts)

    def chosen(self) -> dict[str, Any]:
        return {"base": self.base.name, "capacity": str(self.capacity)}

    def state(self) -> State:
        capacity = asdict(self.capacity)
        return State({"base": self.base.name, "capacity": capacity, "models": list(self.models)})

    def take(self, state: State) -> None:
        self.given = self.given or state.settings["base"]
        self.capacity = Capacity(**state.settings["capacity"])
        self.models = tuple(state.settings["models"])

    def save(self, folder: Path) -> None:
        assert self.scorer is not None, "not fitted"
        shutil.rmtree(folder / _ADAPTER, ignore_errors=True)
        self.scorer.save_pretrained(folder / _ADAPTER)
        super().save(folder)

    @classmethod
    def load(cls, folder: Path, base: Base | str | None = None) -> Self:
        from pliant.complexity import Complexity

        found = cls(base)
        found.take(read_state(folder, cls.kind))
        model = found.base.model
        found.scorer = Complexity.from_pretrained(
            model, folder / _ADAPTER, tokenizer=found.base.tokenizer, name=_free(model)
        )
        return found

    def _train(self, outcomes: Outcomes, capacity: Capacity, seed: int) -> None:
        import torch

        from pliant.complexity import CPXConfig, attach
        from pliant.complexity.training.fit import fit

        model, tokenizer = self.base.model, self.base.tokenizer
        if self.scorer is not None:
            self.scorer.detach()
        config = CPXConfig(
            rows=capacity.rows,
            outputs=tuple(f"right:{name}" for name in outcomes.models),
            aggregation="last" if capacity.rows == 1 else "mean",
            lora_rank=capacity.lora_rank,
            layer=capacity.layer,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.scorer = attach(model, config, tokenizer, name=_free(model))
            prompts = self.base.framed(outcomes.asked)
            known = None
            if self._known is not None:
                known = self._known.of(self.scorer, outcomes.asked)
            fit(self.scorer, prompts, outcomes.right, prefixes=known, seed=seed, **self.lesson)


class _Known:
    """Stored prefixes of prompts, by the layer that they were run to."""

    def __init__(self, base: Base, prompts: Sequence[Prompt]) -> None:
        different = {_key(prompt): prompt for prompt in prompts}
        self.base, self.prompts = base, list(different.values())
        self.row = {key: i for i, key in enumerate(different)}
        self.stored: dict[int | None, Any] = {}

    def of(self, scorer: Complexity, prompts: Sequence[Prompt]) -> Any:
        """Those of some prompts; None where all of them would not fit into memory."""
        layer = scorer.config.layer
        if layer not in self.stored:
            self.stored[layer] = self._computed(scorer)
        found = self.stored[layer]
        return None if found is None else found.take([self.row[_key(prompt)] for prompt in prompts])

    def _computed(self, scorer: Complexity) -> Any:
        from pliant.complexity.training.fit import remember

        some = sorted(self.prompts, key=_length)[-_SAMPLE:]  # the longest: a bound for all
        most = remember(scorer, self.base.framed(some)).bytes / len(some) * len(self.prompts)
        return remember(scorer, self.base.framed(self.prompts)) if most < _ROOM else None


def _key(prompt: Prompt) -> str:
    """What tells it from others, text or conversation."""
    return f"text {prompt}" if isinstance(prompt, str) else f"messages {digest(prompt)}"


def _length(prompt: Prompt) -> int:
    return len(text_of(prompt))


def _told(scores: Scores) -> Predictions:
    right: Floats = scores.values
    return Predictions(right, over_the_first(right))


def _free(model: Any) -> str:
    """A name that nothing attached to the model has yet."""
    from pliant.adapters import attached

    taken = attached(model)
    return next(name for i in range(1, len(taken) + 2) if (name := f"cpx_{i}") not in taken)
