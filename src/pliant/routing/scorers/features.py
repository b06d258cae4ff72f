"""Features of a text: TF-IDF of its words and characters, and its surface (lengths, shares)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pliant.routing.prompts import text_of
from pliant.routing.scorers.protocol import Prompts, State
from pliant.stats import Floats

_DIGIT = re.compile(r"\d")
_NUMBER = re.compile(r"\d+")
_TOKEN = r"(?u)\w+|[^\w\s]"


@dataclass(frozen=True)
class TextSettings:
    """Which features are used, and how many at most."""

    words: int = 20_000
    """The most frequent words, punctuation marks and pairs of them."""
    characters: int = 0
    """The most frequent n-grams of 2 to 5 characters inside words."""
    shapes: bool = True
    """Read every digit as 0, so that 17 and 42 are the same word and 170 is another."""
    waves: int = 0
    """Random Fourier features of the surface, whose sums fit any smooth function of it."""


class TextFeatures:
    """Fitted on the training prompts; a sparse matrix for any prompts."""

    def __init__(self, settings: TextSettings = TextSettings()) -> None:
        self.settings = settings
        self._parts: dict[str, Any] = {}  # vectorizers
        self._waves: _Waves | None = None

    def fit(self, prompts: Prompts, seed: int = 0) -> TextFeatures:
        texts = [text_of(prompt) for prompt in prompts]
        for name in ("words", "characters"):
            most = getattr(self.settings, name)
            if most:
                part = self._vectorizer(name, max_features=most, min_df=2 if len(texts) > 50 else 1)
                self._parts[name] = part.fit(texts)
        if self.settings.waves:
            self._waves = _Waves.of(_surfaces(texts), self.settings.waves, seed)
        return self

    def matrix(self, prompts: Prompts) -> Any:
        """(n, features), sparse."""
        from scipy.sparse import csr_matrix, hstack

        texts = [text_of(prompt) for prompt in prompts]
        # The same total weight for one part as for two.
        scale = np.sqrt(2 / len(self._parts)) if self._parts else 1.0
        blocks = [part.transform(texts) * scale for part in self._parts.values()]
        if self._waves is not None:
            blocks.append(csr_matrix(self._waves(_surfaces(texts))))
        return hstack(blocks, format="csr")

    def state(self) -> State:
        state = State({"settings": asdict(self.settings)})
        for name, part in self._parts.items():
            state.settings[name] = part.get_feature_names_out().tolist()
            state.arrays[f"{name}.idf"] = part.idf_.astype(np.float32)
        if self._waves is not None:
            state.arrays |= {f"waves.{k}": v for k, v in self._waves.arrays().items()}
        return state

    @classmethod
    def from_state(cls, state: State) -> TextFeatures:
        features = cls(TextSettings(**state.settings["settings"]))
        for name in ("words", "characters"):
            if name in state.settings:
                names = state.settings[name]
                part = features._vectorizer(name, vocabulary={w: i for i, w in enumerate(names)})
                part.idf_ = state.arrays[f"{name}.idf"].astype(np.float64)
                features._parts[name] = part
        if features.settings.waves:
            arrays = [state.arrays[f"waves.{each.name}"] for each in fields(_Waves)]
            features._waves = _Waves(*(array.astype(np.float64) for array in arrays))
        return features

    def _vectorizer(self, name: str, **options: Any) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        kind = (
            {"ngram_range": (1, 2), "token_pattern": _TOKEN}
            if name == "words"
            else {"ngram_range": (2, 5), "analyzer": "char_wb"}
        )
        prepare = _digits_as_zero if self.settings.shapes else str.lower
        return TfidfVectorizer(preprocessor=prepare, sublinear_tf=True, **kind, **options)


def _digits_as_zero(text: str) -> str:
    return _DIGIT.sub("0", text.lower())


@dataclass(frozen=True, eq=False)
class _Waves:
    """cos(surface @ weight + phase): random Fourier features of a Gaussian kernel."""

    mean: Floats
    std: Floats
    weight: Floats
    phase: Floats

    @classmethod
    def of(cls, surface: Floats, number: int, seed: int) -> _Waves:
        rng = np.random.default_rng(seed)
        width = surface.shape[1]
        weight = rng.normal(size=(width, number)) / np.sqrt(width)
        phase = rng.uniform(0, 2 * np.pi, number)
        spread = surface.std(axis=0)
        # A constant feature has no scale: its rounding errors would dominate all others.
        return cls(surface.mean(axis=0), np.where(spread > 1e-6, spread, 1.0), weight, phase)

    def __call__(self, surface: Floats) -> Floats:
        # Clip, so that an extreme text counts as one at the edge of the training texts.
        z = np.clip((surface - self.mean) / self.std, -4, 4)
        waves: Floats = np.cos(z @ self.weight + self.phase)
        return waves * np.sqrt(2 / len(self.phase))

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        return {name: value.astype(np.float32) for name, value in vars(self).items()}


def _surfaces(texts: Sequence[str]) -> Floats:
    return np.array([surface(text) for text in texts])


def surface(text: str) -> list[float]:
    """Lengths and shares of kinds of characters, without a vocabulary."""
    lines = np.array([len(line) for line in text.split("\n") if line.strip()] or [0], dtype=float)
    words = text.split() or [""]
    letters = max(1, len(text))
    return [
        np.log1p(len(text)),
        np.log1p(lines[0]),
        np.log1p(lines[-1]),
        np.log1p(lines.mean()),
        np.log1p(lines.max()),
        np.log1p(lines.min()),
        lines.std() / (1 + lines.mean()),
        float(len(lines)),
        sum(c.isdigit() for c in text) / letters,
        sum(c.isupper() for c in text) / letters,
        sum(not c.isalnum() and not c.isspace() for c in text) / letters,
        float("?" in text),
        text.count(",") / letters,
        sum(map(len, words)) / len(words),
        float(max(map(len, words))),
        len(set(words)) / len(words),
        *_numbers(text),
    ]


def _numbers(text: str) -> list[float]:
    """How many numbers there are, how many different ones, and how large they get."""
    lengths = {digits: len(digits) for digits in _NUMBER.findall(text)}
    return [
        np.log1p(sum(1 for _ in _NUMBER.finditer(text))),
        float(len(lengths)),
        float(max(lengths.values(), default=0)),
        np.log1p(sum(text.count(mark) for mark in ".!?")),
        float(sum(text.count(mark) for mark in "%/$")),
    ]
