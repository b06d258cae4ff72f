"""Features of a text: TF-IDF of its words, their topics, and its surface (lengths, shares)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pliant.routing.scorers.protocol import State
from pliant.stats import Floats

_DIGIT = re.compile(r"\d")
_NUMBER = re.compile(r"\d+")
# Scripts without spaces between words: Thai, Lao, Burmese, Khmer; then Chinese and Japanese.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    r"\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    r"\U00020000-\U0003ffff"
)
TOKEN = rf"(?u)[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]"
"""A word or a punctuation mark; a character of scripts without spaces, where a run of letters is a
clause that no other prompt has."""
_MOST = 20_000


class Words:
    """TF-IDF of words, punctuation marks and pairs of them, a sparse row of a prompt.

    The rarest are left out, unless all are rare. With `shapes` every digit is read as 0, so that 17
    and 42 are the same word and 170 is another.

    A row is as long as the share of the prompt that is in the vocabulary: the fewer of its words
    are known, the nearer a prediction is to the mean. Rows of length 1 would let the few words that
    a prompt in a new wording shares with the training prompts speak for all of it.
    """

    def __init__(self, shapes: bool = True) -> None:
        self.shapes = shapes
        self.unknown = 0.0
        """The weight of what is not in the vocabulary, as that of a word is its IDF."""
        self._vectorizer: Any = None

    def fit(self, texts: Sequence[str]) -> Words:
        rarest = 2 if len(texts) > 50 else 1
        try:
            self._vectorizer = self._new(max_features=_MOST, min_df=rarest).fit(texts)
        except ValueError:  # no two texts share a word
            self._vectorizer = self._new(max_features=_MOST).fit(texts)
        self.unknown = float(self._vectorizer.idf_.max())
        return self

    def __call__(self, texts: Sequence[str]) -> Any:
        from scipy.sparse import csr_matrix

        analyze = self._vectorizer.build_analyzer()
        rows = [self._row(Counter(analyze(text))) for text in texts]
        columns = np.concatenate([np.zeros(0, dtype=np.int32), *(at for at, _ in rows)])
        values = np.concatenate([np.zeros(0), *(row for _, row in rows)])
        ends = np.cumsum([0, *(len(row) for _, row in rows)])
        shape = (len(rows), len(self._vectorizer.idf_))
        return csr_matrix((values, columns, ends), shape=shape)

    def _row(self, counts: Counter[str]) -> tuple[NDArray[np.int32], Floats]:
        """The columns of a prompt's words, and their values."""
        vocabulary = self._vectorizer.vocabulary_
        known = sorted((vocabulary[word], n) for word, n in counts.items() if word in vocabulary)
        columns = np.array([column for column, _ in known], dtype=np.int32)
        values = (1 + np.log([n for _, n in known])) * self._vectorizer.idf_[columns]
        missing = [n for word, n in counts.items() if word not in vocabulary]
        length = (values**2).sum() + (self.unknown**2 * (1 + np.log(missing)) ** 2).sum()
        return columns, values / max(np.sqrt(length), 1e-9)

    def state(self) -> State:
        names = self._vectorizer.get_feature_names_out().tolist()
        idf = self._vectorizer.idf_.astype(np.float32)
        settings = {"words": names, "shapes": self.shapes, "unknown": self.unknown}
        return State(settings, {"words.idf": idf})

    @classmethod
    def from_state(cls, state: State) -> Words:
        shapes, names = state.settings["shapes"], state.settings["words"]
        unknown = float(state.settings.get("unknown", 0.0))  # files of before it was counted
        vocabulary = {word: i for i, word in enumerate(names)}
        if not isinstance(shapes, bool) or not all(isinstance(word, str) for word in names):
            raise ValueError("words that are no texts, or shapes that are not true or false")
        if state.arrays["words.idf"].shape != (len(names),) or len(vocabulary) != len(names):
            raise ValueError(f"a vocabulary of {len(vocabulary)} words of {len(names)}")
        if not 0 <= unknown < math.inf:
            raise ValueError(f"the weight {unknown} of unknown words")
        words = cls(shapes)
        words.unknown = unknown
        words._vectorizer = words._new(vocabulary=vocabulary)
        words._vectorizer.idf_ = state.arrays["words.idf"].astype(np.float64)
        return words

    def _new(self, **options: Any) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        return TfidfVectorizer(
            preprocessor=_digits_as_zero if self.shapes else str.lower,
            token_pattern=TOKEN,
            ngram_range=(1, 2),
            **options,
        )


def hashed_counts(texts: Sequence[str], buckets: int) -> Any:
    """(n, buckets), sparse: how often each word, and pair of words, is in a text.

    No vocabulary is needed, so that texts that are counted at different times can be compared.
    Files hold such counts: they stay as they are whatever scorers look at.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        n_features=buckets,
        alternate_sign=False,
        norm=None,
        ngram_range=(1, 2),
        token_pattern=TOKEN,
        preprocessor=_digits_as_zero,
        dtype=np.float32,
    )
    return vectorizer.transform(texts)


def _digits_as_zero(text: str) -> str:
    return _DIGIT.sub("0", text.lower())


@dataclass(frozen=True, eq=False)
class Topics:
    """A few directions in which the words of the training prompts differ most; rows of length 1.

    Any vectors of the prompts will do in place of the words, such as sentence embeddings.
    """

    mean: Floats
    directions: Floats
    """(features, topics)"""

    def __post_init__(self) -> None:
        if self.directions.ndim != 2 or self.mean.shape != self.directions.shape[1:]:
            raise ValueError(
                f"topics of {self.directions.shape} beside a mean of {self.mean.shape}"
            )

    @classmethod
    def of(cls, vectors: Any, number: int) -> Topics:
        """The first singular vectors of these rows."""
        number = min(number, min(vectors.shape) - 1)
        if number < 1:
            return cls(np.zeros(1), np.zeros((vectors.shape[1], 1)))
        from sklearn.utils.extmath import randomized_svd

        # Not ARPACK: it draws again where directions are equally important, and may give up there.
        _, _, right = randomized_svd(vectors.astype(np.float64), number, random_state=0)
        directions = np.ascontiguousarray(right.T)
        return cls(np.asarray((vectors @ directions).mean(axis=0)), directions)

    def __call__(self, vectors: Any) -> Floats:
        centred = np.asarray(vectors @ self.directions) - self.mean
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        unit: Floats = centred / np.maximum(length, 1e-9)
        return unit

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        return {name: value.astype(np.float32) for name, value in vars(self).items()}


@dataclass(frozen=True, eq=False)
class Surface:
    """Random Fourier features of a text's surface: cos(surface @ weight + phase).

    Their sums fit any smooth function of lengths and shares of kinds of characters.
    """

    mean: Floats
    std: Floats
    weight: Floats
    phase: Floats

    def __post_init__(self) -> None:
        width = (len(surface("")),)
        shapes = self.mean.shape, self.std.shape, self.weight.shape
        if shapes != (width, width, width + self.phase.shape) or self.phase.ndim != 1:
            raise ValueError(f"a surface of {shapes} and {self.phase.shape}")
        if not (self.std > 0).all():
            raise ValueError("a standard deviation that is not above 0")

    @classmethod
    def of(cls, texts: Sequence[str], number: int, seed: int) -> Surface:
        rows = np.array([surface(text) for text in texts])
        rng = np.random.default_rng(seed)
        width = rows.shape[1]
        weight = rng.normal(size=(width, number)) / np.sqrt(width)
        phase = rng.uniform(0, 2 * np.pi, number)
        spread = rows.std(axis=0)
        # A constant feature has no scale: its rounding errors would dominate all others.
        return cls(rows.mean(axis=0), np.where(spread > 1e-6, spread, 1.0), weight, phase)

    def __call__(self, texts: Sequence[str]) -> Floats:
        rows = np.array([surface(text) for text in texts]).reshape(-1, len(self.mean))
        # Clip, so that an extreme text counts as one at the edge of the training texts.
        z = np.clip((rows - self.mean) / self.std, -4, 4)
        waves: Floats = np.cos(z @ self.weight + self.phase)
        return waves * np.sqrt(2 / len(self.phase))

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        return {name: value.astype(np.float32) for name, value in vars(self).items()}


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
