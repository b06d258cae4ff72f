"""Scorers predict from a prompt which models would get it right.

scorer = make("text").fit(train, choice)
scorer.predict(["What is 2 + 2?"]).gain
scorer.save(folder); load(folder)
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from pliant.errors import CorruptFile, InvalidInput, did_you_mean
from pliant.routing.scorers.protocol import Predictions, Prefilling, Scorer, read_index

# The module and class of each kind; imported on first use, because some need torch.
_CLASSES = {
    "random": ("baselines", "Random"),
    "length": ("baselines", "Length"),
    "group": ("baselines", "Group"),
    "oracle": ("baselines", "Oracle"),
    "tfidf": ("baselines", "Tfidf"),
    "tfidf-ridge": ("baselines", "TfidfRidge"),
    "tfidf-logistic": ("baselines", "TfidfLogistic"),
    "knn": ("baselines", "Neighbours"),
    "pair": ("text", "Pair"),
    "text": ("text", "Text"),
    "text+group": ("text", "TextAndGroup"),
    "probe": ("base_model", "Probe"),
    "cpx": ("cpx", "Cpx"),
}
KINDS = tuple(_CLASSES)
READS_A_MODEL = ("probe", "cpx")
_DROPPED = {
    # benchmarks/results/routing_nano.json: an APGR below that of cpx, on both test sets.
    "cpx+text": "Pliant dropped it, because 'cpx' was better: fit the router again with 'cpx'"
}

__all__ = [
    "KINDS",
    "READS_A_MODEL",
    "Prefilling",
    "Predictions",
    "Scorer",
    "kind_class",
    "load",
    "make",
    "read_index",
]


def make(kind: str, **settings: Any) -> Scorer:
    """A new scorer, to be fitted."""
    return kind_class(kind)(**settings)


def load(folder: str | Path, **settings: Any) -> Scorer:
    """A saved scorer of any kind."""
    from pliant.routing.scorers.novelty import NOVELTY, NoveltyDetector, WithNovelty

    path = Path(folder)
    kind = read_index(path)["kind"]
    if kind not in _CLASSES:
        reason = _DROPPED.get(kind, "this Pliant does not know it")
        raise CorruptFile(f"{path}: a scorer of kind {kind!r}: {reason}")
    scorer = kind_class(kind).load(path, **settings)
    if (path / NOVELTY).is_file():
        return WithNovelty(scorer, NoveltyDetector.load(path))
    return scorer


def kind_class(kind: str) -> type[Scorer]:
    """The class of a kind; the error about an unknown kind names those like it."""
    if kind in _DROPPED:
        raise InvalidInput(f"no scorer is called {kind!r}: {_DROPPED[kind]}")
    if kind not in _CLASSES:
        raise InvalidInput(f"no scorer is called {kind!r}{did_you_mean(kind, KINDS)}")
    module, name = _CLASSES[kind]
    scorer: type[Scorer] = getattr(import_module(f"pliant.routing.scorers.{module}"), name)
    return scorer
