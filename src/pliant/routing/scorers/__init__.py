"""Scorers: from a prompt to who would get it right, all of one protocol.

scorer = make("text").fit(train, choice)
scorer.predict(["What is 2 + 2?"]).gain
scorer.save(folder); load(folder)
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from pliant.data import nearest
from pliant.errors import CorruptFile, InvalidInput
from pliant.routing.scorers.protocol import Predictions, Scorer, read_index

# Which class each kind is; imported when it is asked for, because some need torch.
_HOME_OF = {
    "random": ("controls", "Random"),
    "length": ("controls", "Length"),
    "group": ("controls", "Group"),
    "oracle": ("controls", "Oracle"),
    "tfidf": ("tfidf", "Tfidf"),
    "tfidf-ridge": ("tfidf", "TfidfRidge"),
    "tfidf-logistic": ("tfidf", "TfidfLogistic"),
    "knn": ("knn", "Neighbours"),
    "pair": ("pair", "Pair"),
    "text": ("text", "Text"),
    "text+group": ("text", "TextAndGroup"),
    "probe": ("probe", "Probe"),
    "cpx": ("cpx", "Cpx"),
    "cpx+text": ("blend", "CpxAndText"),
}
KINDS = tuple(_HOME_OF)
FAMILIAR = "familiar.safetensors"
"""Beside a scorer that knows what is unlike its training prompts."""

__all__ = ["KINDS", "Predictions", "Scorer", "kind_class", "load", "make"]


def make(kind: str, **settings: Any) -> Scorer:
    """A scorer that is not fitted yet."""
    return kind_class(kind)(**settings)


def load(folder: str | Path, **settings: Any) -> Scorer:
    """A saved scorer, whichever kind it is."""
    path = Path(folder)
    kind = read_index(path)["kind"]
    if kind not in _HOME_OF:
        raise CorruptFile(f"{path}: a scorer of kind {kind!r}, which this Pliant does not know")
    found = kind_class(kind).load(path, **settings)
    if not (path / FAMILIAR).is_file():
        return found
    from pliant.routing.scorers.familiar import Familiar, Watched

    return Watched(found, Familiar.load(path))


def kind_class(kind: str) -> type[Scorer]:
    """The class of a kind; an unknown one is named with its nearest."""
    if kind not in _HOME_OF:
        raise InvalidInput(f"no scorer is called {kind!r}{nearest(kind, KINDS)}")
    module, name = _HOME_OF[kind]
    found: type[Scorer] = getattr(import_module(f"pliant.routing.scorers.{module}"), name)
    return found
