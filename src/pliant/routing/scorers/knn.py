"""Who was right on the most similar prompts: hard to beat, and as large as its training set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np

from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt
from pliant.routing.scorers.features import TextFeatures, TextSettings
from pliant.routing.scorers.fitting import Floats, best, gain_error, together
from pliant.routing.scorers.protocol import Predictions, Scorer, State, over_the_first

_AT_ONCE = 512  # rows of the table of similarities held in memory


class Neighbours(Scorer):
    """The mean over the k nearest by the cosine of TF-IDF vectors, the nearer the weightier."""

    kind = "knn"
    settings: ClassVar[TextSettings] = TextSettings(words=10_000, characters=10_000)
    numbers: ClassVar[tuple[int, ...]] = (10, 30, 100)
    """What k is chosen among."""

    def __init__(self) -> None:
        self.features = TextFeatures(self.settings)
        self.k = self.numbers[1]
        self.known: Any = None
        """(n, features) of the training prompts, sparse, each of length 1."""
        self.right: Floats = np.zeros((0, 0))

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        everything = together(train, choice)
        self.features = TextFeatures(self.settings).fit(everything.prompts, seed)
        vectors, right = self._vectors(everything.prompts), everything.right
        if choice is not None:
            n = len(train)
            self.known, self.right = vectors[:n], right[:n]

            def error(k: int) -> float:
                return gain_error(over_the_first(self._ask(vectors[n:], k)), choice)

            self.k, _ = best(self.numbers, error)
        self.known, self.right = vectors, right
        return self

    def predict(
        self, prompts: Sequence[Prompt], groups: Sequence[str] | None = None
    ) -> Predictions:
        right = self._ask(self._vectors(prompts), self.k)
        return Predictions(right, over_the_first(right))

    def chosen(self) -> dict[str, Any]:
        return {"k": self.k}

    def state(self) -> State:
        state = self.features.state()
        state.settings |= {"k": self.k, "width": self.known.shape[1]}
        state.arrays |= {
            "data": self.known.data.astype(np.float16),
            "indices": self.known.indices.astype(np.int32),
            "indptr": self.known.indptr.astype(np.int64),
            "right": self.right.astype(np.float32),
        }
        return state

    def take(self, state: State) -> None:
        from scipy.sparse import csr_matrix

        self.features, self.k = TextFeatures.of(state), state.settings["k"]
        a = state.arrays
        shape = (len(a["indptr"]) - 1, state.settings["width"])
        data = a["data"].astype(np.float32)
        self.known = csr_matrix((data, a["indices"], a["indptr"]), shape=shape)
        self.right = a["right"].astype(np.float64)

    def _vectors(self, prompts: Sequence[Prompt]) -> Any:
        from sklearn.preprocessing import normalize

        return normalize(self.features.matrix(prompts).astype(np.float32))

    def _ask(self, vectors: Any, k: int) -> Floats:
        k, n = min(k, len(self.right)), vectors.shape[0]
        found = np.zeros((n, self.right.shape[1]))
        for start in range(0, n, _AT_ONCE):
            near = (vectors[start : start + _AT_ONCE] @ self.known.T).toarray()
            which = np.argpartition(-near, k - 1, axis=1)[:, :k]
            weight = np.maximum(np.take_along_axis(near, which, axis=1), 0.0) + 1e-3
            weight /= weight.sum(axis=1, keepdims=True)
            found[start : start + _AT_ONCE] = np.einsum("nk,nkm->nm", weight, self.right[which])
        return np.clip(found, 0.0, 1.0)
