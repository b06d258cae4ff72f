"""Is a prompt of a kind that the router was made on? What is not gets the safe default.

The commonest runs of five characters of the training prompts are kept as bits of a table. A prompt
is novel if fewer of its runs are known than of all but a few of the prompts that were held back.
What is written in known words is near, whatever it asks: this tells another language, another
notation or another subject, not another intention.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt, text_of
from pliant.routing.scorers import FAMILIAR
from pliant.routing.scorers.protocol import (
    Predictions,
    Scorer,
    State,
    read_arrays,
    write_arrays,
)

if TYPE_CHECKING:
    from pliant.routing.live.shared_prefill import Prefilling

_LENGTH, _MOST = 5, 20_000
_BITS = 2**18  # 32 KB, of which at most 8 % are set: few runs are known by accident
_RARE = 0.005
"""The share of like prompts that is taken for unlike."""
_DIGIT, _SPACE = re.compile(r"\d"), re.compile(r"\s+")


class Familiar:
    """The runs that are known, and the share of them that is enough."""

    def __init__(self, known: NDArray[np.bool_], bound: float) -> None:
        self.known, self.bound = known, bound

    @classmethod
    def fit(cls, train: Sequence[Prompt], held: Sequence[Prompt]) -> Familiar:
        """The runs of `train`; the bound from prompts that are none of these."""
        counted = Counter(run for prompt in train for run in _runs(prompt))
        known = np.zeros(_BITS, dtype=np.bool_)
        known[[_place(run) for run, _ in counted.most_common(_MOST)]] = True
        familiar = cls(known, 0.0)
        familiar.bound = float(np.quantile(familiar.share(held), _RARE))
        return familiar

    def share(self, prompts: Sequence[Prompt]) -> NDArray[np.float64]:
        """(n,) of each prompt's runs, how many are known."""
        places = ([_place(run) for run in _runs(prompt)] for prompt in prompts)
        return np.array([self.known[at].mean() for at in places])

    def novel(self, prompts: Sequence[Prompt]) -> NDArray[np.bool_]:
        """(n,) whether a prompt is unlike those that it was made on."""
        return self.share(prompts) < self.bound

    def save(self, folder: Path) -> None:
        kept = {"known": np.packbits(self.known), "bound": np.array([self.bound])}
        write_arrays(folder / FAMILIAR, kept)

    @classmethod
    def load(cls, folder: Path) -> Familiar:
        arrays = read_arrays(folder / FAMILIAR)
        return cls(np.unpackbits(arrays["known"]).astype(np.bool_), float(arrays["bound"][0]))


def _runs(prompt: Prompt) -> set[str]:
    """Of the text with every digit as 0, and one space for each stretch of white space."""
    text = f" {_SPACE.sub(' ', _DIGIT.sub('0', text_of(prompt).lower()))} "
    return {text[i : i + _LENGTH] for i in range(max(1, len(text) - _LENGTH + 1))}


def _place(run: str) -> int:
    return zlib.crc32(run.encode("utf-8", "replace")) % _BITS


class Watched(Scorer):
    """A scorer that also says which prompts are novel; of the kind of the one inside."""

    kind = "watched"

    def __init__(self, scorer: Scorer, familiar: Familiar) -> None:
        self.scorer, self.familiar = scorer, familiar
        self.kind = scorer.kind  # type: ignore[misc]
        self.needs_groups = scorer.needs_groups  # type: ignore[misc]

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        self.scorer.fit(train, choice, seed)
        return self

    def predict(
        self, prompts: Sequence[Prompt], groups: Sequence[str] | None = None
    ) -> Predictions:
        return replace(self.scorer.predict(prompts, groups), novel=self.familiar.novel(prompts))

    def while_answering(self, prompt: Prompt) -> Prefilling | None:
        """What the scorer inside offers, if it reads a model that answers."""
        offer = getattr(self.scorer, "while_answering", None)
        own: Prefilling | None = None if offer is None else offer(prompt)
        if own is None:
            return None
        told = own.told
        return replace(own, told=lambda x: replace(told(x), novel=self.familiar.novel([prompt])))

    def chosen(self) -> dict[str, Any]:
        return self.scorer.chosen()

    def save(self, folder: Path) -> None:
        self.scorer.save(folder)
        self.familiar.save(folder)

    def state(self) -> State:
        return self.scorer.state()

    def take(self, state: State) -> None:
        self.scorer.take(state)
