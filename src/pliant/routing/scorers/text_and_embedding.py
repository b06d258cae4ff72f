"""The text scorer with sentence embeddings: beside the words, and as topics of their own.

An encoder knows which prompts are about the same thing even if they share no word: see
`python -m benchmarks.routing_learning` for what that is worth.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers.base_model import BaseLM
from pliant.routing.scorers.blocks import Blocks
from pliant.routing.scorers.embed import default_encoder, reader_of
from pliant.routing.scorers.features import Topics
from pliant.routing.scorers.protocol import Groups, Predictions, Prompts, State, read_state
from pliant.routing.scorers.text import TOPICS, Text
from pliant.routing.scorers.vectors import Reader, check_base
from pliant.stats import Floats

_HALF = 0.5**0.5
"""The weight of the embeddings, and of both kinds of topics: together they weigh as much as one."""


class TextAndEmbedding(Text):
    """Text, with embeddings beside the words, and with their topics beside those of the words."""

    kind = "text+embed"
    mean: Floats
    """Of the training prompts' embeddings."""
    meanings: Topics
    """The topics of the embeddings."""

    def __init__(self, base: Reader | BaseLM | str | None = None) -> None:
        """`base` is an encoder or a language model, by its name, as for `embed`."""
        super().__init__()
        self._base = base
        self.trained_on: dict[str, Any] | None = None
        self._checked = False

    @property
    def reader(self) -> Reader:
        if not isinstance(self._base, Reader):
            self._base = reader_of(default_encoder() if self._base is None else self._base)
        return self._base

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        from pliant.adapters import fingerprint

        super().fit(train, choice, seed)
        self.trained_on, self._checked = asdict(fingerprint(self.reader.model)), True
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        if not self._checked:
            check_base(self.reader, self.trained_on, self.kind)
            self._checked = True
        return super().predict(prompts, groups)

    def flops(self, prompts: Prompts) -> float:
        return self.reader.flops(prompts, self.layer)

    @property
    def layer(self) -> int:
        """After which it reads: an encoder's only one, or a language model's middle one."""
        layers = self.reader.layers
        return layers[len(layers) // 2]

    def chosen(self) -> dict[str, Any]:
        return {"base": self.reader.name, **super().chosen()}

    def state(self) -> State:
        state = super().state()
        state.settings |= {"base": self.reader.name, "fingerprint": self.trained_on}
        state.arrays["embedding.mean"] = self.mean
        state.arrays |= {f"meanings.{name}": x for name, x in self.meanings.arrays().items()}
        return state

    def load_state(self, state: State) -> None:
        super().load_state(state)
        self._base = state.settings["base"] if self._base is None else self._base
        self.trained_on = state.settings["fingerprint"]
        arrays = {name: x.astype(np.float64) for name, x in state.arrays.items()}
        self.mean = arrays["embedding.mean"]
        self.meanings = Topics(*(arrays[f"meanings.{each.name}"] for each in fields(Topics)))

    @classmethod
    def load(cls, folder: Path, base: Reader | BaseLM | str | None = None) -> Self:
        scorer = cls(base)
        scorer.load_state(read_state(folder, cls.kind))
        return scorer

    def _prepare(self, outcomes: Outcomes, seed: int) -> Blocks:
        self.reader.remember(outcomes.asked)
        vectors = self._vectors(outcomes.asked)
        self.mean = vectors.mean(axis=0)
        self.meanings = Topics.of(vectors - self.mean, TOPICS)
        return super()._prepare(outcomes, seed)

    def _features(self, prompts: Prompts, groups: Groups) -> Blocks:
        x, centred = super()._features(prompts, groups), self._vectors(prompts) - self.mean
        unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)
        topics = np.hstack([x.topics, self.meanings(centred)])
        return Blocks(x.words, np.hstack([x.dense, _HALF * unit]), _HALF * topics, x.waves)

    def _vectors(self, prompts: Prompts) -> Floats:
        return self.reader.read(prompts, self.layer).astype(np.float64)
