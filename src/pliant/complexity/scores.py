"""The scores of prompts. One polarity: score = 1 - P(this model succeeds), so 1 is hard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pliant.complexity.config import GAIN, RIGHT, SCORE, Reads
from pliant.errors import InvalidInput
from pliant.stats import as_difference, sigmoid


@dataclass(frozen=True, eq=False)
class Scores:
    """The head's logits for each prompt, and what they mean."""

    outputs: tuple[str, ...]
    logits: np.ndarray
    """(n, outputs)"""
    truncated: int = 0
    """How many prompts were too long and were truncated before they were scored."""
    reads: Reads = "probabilities"
    """What the outputs were trained as."""

    @property
    def values(self) -> np.ndarray:
        """(n, outputs): probabilities (of classes: summing to 1), gains in [-1, 1], and numbers as
        they are."""
        if self.reads == "numbers":
            return self.logits
        if self.reads == "classes":
            return _softmax(self.logits)
        linear = np.array([name == GAIN for name in self.outputs])
        return np.where(linear, as_difference(self.logits), sigmoid(self.logits))

    @property
    def score(self) -> np.ndarray:
        """(n,) in [0, 1]: the probability that the prompt is hard for the model."""
        if SCORE in self.outputs and self.reads == "numbers":
            raise InvalidInput(
                f"this scorer's {SCORE!r} was trained as a number, not a probability: read it with "
                f"scores[{SCORE!r}], or train with loss='bce'"
            )
        if SCORE in self.outputs:
            return self[SCORE]
        right = self._right
        if right is None:
            raise InvalidInput(
                f"this scorer's outputs are {', '.join(self.outputs)}: none is called {SCORE!r} or "
                f"'{RIGHT}...', so read one by its name: scores[{self.outputs[0]!r}]"
            )
        return 1.0 - right[:, 0]

    @property
    def gain(self) -> np.ndarray | None:
        """(n,) P(the strong model is right) - P(this one is), in [-1, 1]; None without an output
        for it."""
        if GAIN in self.outputs:
            return self[GAIN]
        right = self._right
        return None if right is None or right.shape[1] < 2 else right[:, -1] - right[:, 0]

    @property
    def _right(self) -> np.ndarray | None:
        which = [i for i, name in enumerate(self.outputs) if name.startswith(RIGHT)]
        return self.values[:, which] if which and self.reads != "numbers" else None

    def __getitem__(self, output: str) -> np.ndarray:
        """(n,) values of one output."""
        if output not in self.outputs:
            raise InvalidInput(f"no output is called {output!r}: there are {self.outputs}")
        column: np.ndarray = self.values[:, self.outputs.index(output)]
        return column

    def __len__(self) -> int:
        return len(self.logits)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: the values by output, and the logits."""
        return {
            "values": {name: self[name].tolist() for name in self.outputs},
            "logits": self.logits.tolist(),
            "truncated": self.truncated,
            "reads": self.reads,
        }

    def __str__(self) -> str:
        means = [f"mean {name} {self[name].mean():.3f}" for name in self.outputs if len(self)]
        truncated = [f"{self.truncated} truncated"] if self.truncated else []
        return ", ".join([f"{len(self)} prompts scored", *means, *truncated])


def _softmax(x: np.ndarray) -> np.ndarray:
    shares: np.ndarray = np.exp(x - np.logaddexp.reduce(x, axis=1, keepdims=True))
    return shares
