"""The [CPX] token as a router's scorer: it reads the base model's own prefill of the prompt.

Each of a few capacities is trained on the training split alone, and the best on the choice split is
then trained on both. benchmarks/routing_nano.py measures it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt, digest, text_of
from pliant.routing.scorers.base_model import BaseLM, ModelScorer
from pliant.routing.scorers.linear import Floats, best, gain_error, together
from pliant.routing.scorers.protocol import (
    Groups,
    Predictions,
    Prefilling,
    Prompts,
    State,
    gains,
    read_state,
)

if TYPE_CHECKING:
    from pliant.complexity import Complexity, Scores
    from pliant.complexity.prefix_cache.store import PrefixStore

_ADAPTER = "cpx"
"""The folder of the trained [CPX] adapter, inside the scorer's."""


@dataclass(frozen=True)
class Capacity:
    """How much a scorer can learn."""

    rows: int = 1
    lora_rank: int = 8
    layer: int | None = None
    """How many layers run before the rows are read; None runs all."""

    def __str__(self) -> str:
        layer = "" if self.layer is None else f", layer {self.layer}"
        return f"{self.rows} row{'s' * (self.rows > 1)}, LoRA rank {self.lora_rank}{layer}"


CAPACITIES = (Capacity(1, 0), Capacity(1, 4), Capacity(1, 8), Capacity(4, 8))


_CACHE_BYTES, _SAMPLE = 8e9, 8
"""The most bytes of keys and values in memory; how many of the longest prompts estimate them."""
_ROWS_FOR_CHOICE = 8_000
"""How many training rows the candidates are trained on, at most."""


class Cpx(ModelScorer):
    """Predicts for each model the probability that it is right; the gain is the difference."""

    kind = "cpx"

    def __init__(
        self,
        base: BaseLM | str | None = None,
        capacities: Sequence[Capacity] = CAPACITIES,
        epochs: int = 6,
    ) -> None:
        super().__init__(base)
        self.capacities = tuple(capacities)
        # Chosen on development questions of the nano world.
        self.training: dict[str, Any] = {
            "num_epochs": epochs,
            "batch_size": 32,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
        }
        self.capacity = self.capacities[-1]
        self.errors: dict[str, float] = {}
        """The mean squared error of the gain on the choice split, for each candidate."""
        self.models: tuple[str, ...] = ()
        self.scorer: Complexity | None = None
        self._cache: _PrefixCache | None = None

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        everything = together(train, choice)
        self._cache = _PrefixCache(self.base, everything.asked)
        try:
            if choice is not None and len(self.capacities) > 1:
                self._choose(train, choice, seed)
            self.models = everything.models
            self._train(everything, self.capacity, seed)
        finally:
            self._cache = None
        return self

    def _choose(self, train: Outcomes, choice: Outcomes, seed: int) -> None:
        """The capacity that, trained on `train`, is best on `choice`."""
        few = train.select(np.arange(min(len(train), _ROWS_FOR_CHOICE)))

        def error(capacity: Capacity) -> float:
            self._train(few, capacity, seed)
            return gain_error(self.predict(choice.asked).gain, choice)

        self.capacity, self.errors = best(self.capacities, error)

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        assert self.scorer is not None, "not fitted"
        return _predictions(self.scorer.score(self.base.chat_format(prompts)))

    def while_answering(self, prompt: Prompt) -> Prefilling:
        """Predict in the prefill of the base model's own answer to one prompt."""
        assert self.scorer is not None, "not fitted"
        return Prefilling(self.scorer, _predictions)

    def chosen(self) -> dict[str, Any]:
        return {"base": self.base.name, "capacity": str(self.capacity)}

    def state(self) -> State:
        capacity = asdict(self.capacity)
        return State({"base": self.base.name, "capacity": capacity, "models": list(self.models)})

    def load_state(self, state: State) -> None:
        self._base = self._base or state.settings["base"]
        self.capacity = Capacity(**state.settings["capacity"])
        self.models = tuple(state.settings["models"])

    def save(self, folder: Path) -> None:
        assert self.scorer is not None, "not fitted"
        shutil.rmtree(folder / _ADAPTER, ignore_errors=True)
        self.scorer.save_pretrained(folder / _ADAPTER)
        super().save(folder)

    @classmethod
    def load(cls, folder: Path, base: BaseLM | str | None = None) -> Self:
        from pliant.complexity import Complexity

        loaded = cls(base)
        loaded.load_state(read_state(folder, cls.kind))
        model, tokenizer = loaded.base.model, loaded.base.tokenizer
        loaded.scorer = Complexity.from_pretrained(
            model, folder / _ADAPTER, tokenizer=tokenizer, name=_unused_name(model)
        )
        return loaded

    def _train(self, outcomes: Outcomes, capacity: Capacity, seed: int) -> None:
        import torch

        from pliant.complexity import CPXConfig, attach
        from pliant.complexity.training.run import fit

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
            self.scorer = attach(model, config, tokenizer, name=_unused_name(model))
            prompts = self.base.chat_format(outcomes.asked)
            prefixes = None if self._cache is None else self._cache.of(self.scorer, outcomes.asked)
            fit(self.scorer, prompts, outcomes.right, prefixes=prefixes, seed=seed, **self.training)


class _PrefixCache:
    """The prompts' keys and values, by the number of layers that they ran through."""

    def __init__(self, base: BaseLM, prompts: Prompts) -> None:
        distinct = {_key(prompt): prompt for prompt in prompts}
        self.base, self.prompts = base, list(distinct.values())
        self.row = {key: i for i, key in enumerate(distinct)}
        self.prefixes: dict[int | None, PrefixStore | None] = {}

    def of(self, scorer: Complexity, prompts: Prompts) -> PrefixStore | None:
        """The prefixes of these prompts; None if all prompts' would not fit into memory."""
        layer = scorer.config.layer
        if layer not in self.prefixes:
            self.prefixes[layer] = self._compute(scorer)
        prefixes, rows = self.prefixes[layer], [self.row[_key(prompt)] for prompt in prompts]
        return None if prefixes is None else prefixes.select(rows)

    def _compute(self, scorer: Complexity) -> PrefixStore | None:
        from pliant.complexity.training.run import remember

        longest = sorted(self.prompts, key=lambda prompt: len(text_of(prompt)))[-_SAMPLE:]
        sample = remember(scorer, self.base.chat_format(longest)).bytes / len(longest)
        if sample * len(self.prompts) >= _CACHE_BYTES:
            return None
        return remember(scorer, self.base.chat_format(self.prompts))


def _key(prompt: Prompt) -> str:
    """Identifies a prompt, text or conversation."""
    return f"text {prompt}" if isinstance(prompt, str) else f"messages {digest(prompt)}"


def _predictions(scores: Scores) -> Predictions:
    right: Floats = scores.values
    return Predictions(right, gains(right))


def _unused_name(model: Any) -> str:
    """A name that no adapter on the model has."""
    from pliant.adapters import attached

    names = attached(model)
    return next(name for i in range(1, len(names) + 2) if (name := f"cpx_{i}") not in names)
