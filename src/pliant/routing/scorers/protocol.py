"""What every scorer is: fitted on a label table, it says of a prompt who would get it right."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from pliant.adapters.files import write_file
from pliant.errors import CorruptFile, InvalidInput
from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt

Floats = NDArray[np.float64]

FORMAT = 1
INDEX, WEIGHTS = "scorer.json", "scorer.safetensors"


@dataclass(frozen=True, eq=False)
class Predictions:
    """One row a prompt, one column a model, the cheapest model first."""

    right: Floats | None
    """(n, m) P(model j is right); None for a scorer that says nothing of it."""
    gain: Floats
    """(n, m) how much more often model j is right than the first; its first column is 0."""
    novel: NDArray[np.bool_] | None = None
    """(n,) whether a prompt is unlike all that the scorer was fitted on; None if nobody looked."""

    @property
    def score(self) -> Floats:
        """(n,) the probability that the prompt is hard for the cheapest model."""
        if self.right is None:
            raise InvalidInput("this scorer orders prompts and states no probabilities")
        return 1.0 - self.right[:, 0]

    @property
    def last_gain(self) -> Floats:
        """(n,) of the dearest model over the cheapest."""
        return self.gain[:, -1]

    def __len__(self) -> int:
        return len(self.gain)


@dataclass
class State:
    """What a scorer keeps: settings that JSON can say, and arrays."""

    settings: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


class Scorer(ABC):
    """Fitted once, then asked; saved as JSON and safetensors."""

    kind: ClassVar[str]
    needs_groups: ClassVar[bool] = False
    """Whether `predict` is worth nothing without the prompts' groups."""
    saveable: ClassVar[bool] = True

    @abstractmethod
    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        """Learn from `train`; what has a capacity to choose chooses it on `choice`."""

    @abstractmethod
    def predict(
        self, prompts: Sequence[Prompt], groups: Sequence[str] | None = None
    ) -> Predictions:
        """One row for each prompt."""

    @abstractmethod
    def state(self) -> State:
        """All that `take` needs."""

    @abstractmethod
    def take(self, state: State) -> None:
        """Become what `state` says."""

    def flops(self, prompts: Sequence[Prompt]) -> float:
        """What scoring one of these takes, on average; without a model it is next to nothing."""
        return 0.0

    def chosen(self) -> dict[str, Any]:
        """What was chosen on the choice split, for people to read."""
        return {}

    def save(self, folder: Path) -> None:
        """Write the scorer; `load` in this package reads it."""
        state = self.state()
        index = {"format": FORMAT, "kind": self.kind, "settings": state.settings}
        folder.mkdir(parents=True, exist_ok=True)
        write_arrays(folder / WEIGHTS, state.arrays)
        write_file(folder / INDEX, json.dumps(index, ensure_ascii=False).encode())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """A saved scorer, ready to be asked."""
        found = cls()
        found.take(read_state(folder, cls.kind))
        return found


def read_index(folder: Path) -> Mapping[str, Any]:
    """What a scorer's folder says of itself."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
        if index["format"] > FORMAT:
            raise CorruptFile(f"{path}: of format {index['format']}; this Pliant reads {FORMAT}")
        if not isinstance(index["kind"], str) or not isinstance(index["settings"], dict):
            raise TypeError("kind and settings are due")
    except FileNotFoundError:
        raise CorruptFile(f"{folder}: holds no {INDEX}, so no scorer") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFile(f"{path}: not what Pliant writes ({error})") from error
    found: Mapping[str, Any] = index
    return found


def read_state(folder: Path, kind: str) -> State:
    """The saved state of a scorer of this kind."""
    index = read_index(folder)
    if index["kind"] != kind:
        raise CorruptFile(f"{folder}: holds a scorer of kind {index['kind']!r}, not {kind!r}")
    return State(dict(index["settings"]), read_arrays(folder / WEIGHTS))


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """A safetensors file, in one step."""
    apart = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_file(path, save_tensors(apart))


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """What `write_arrays` wrote."""
    try:
        return dict(load_tensors(path.read_bytes()))
    except FileNotFoundError:
        raise CorruptFile(f"{path}: missing") from None
    except (SafetensorError, ValueError) as error:
        raise CorruptFile(f"{path}: truncated or damaged ({error})") from error


def over_the_first(values: Floats) -> Floats:
    """(n, m) of each model less the first: what gain means."""
    return values - values[:, :1]
