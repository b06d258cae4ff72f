"""Scorers predict from a prompt which models would get it right.

scorer = make("text").fit(train, choice)
scorer.predict(["What is 2 + 2?"]).gain
scorer.save(folder); load(folder)

A scorer of your own is a class like those in this folder (`protocol.Scorer`). `register` makes its
kind known in a program, an entry point of the group "pliant.scorers" in every one that has your
package installed, and `module:Class` where a name is expected imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pliant.errors import CorruptFile, InvalidInput, PliantError, did_you_mean
from pliant.routing.scorers.protocol import Predictions, Prefilling, Scorer, read_index

# The module and class of each kind; imported on first use, because some need torch.
_CLASSES = {
    "random": ("baselines", "Random"),
    "length": ("baselines", "Length"),
    "group": ("baselines", "Group"),
    "oracle": ("baselines", "Oracle"),
    "tfidf": ("baselines", "Tfidf"),
    "knn": ("baselines", "Neighbours"),
    "text": ("text", "Text"),
    "text+group": ("text", "TextAndGroup"),
    "embed": ("embed", "Embed"),
    "text+embed": ("text_and_embedding", "TextAndEmbedding"),
    "stack": ("stack", "Stack"),
    "probe": ("base_model", "Probe"),
    "cpx": ("cpx", "Cpx"),
}
KINDS = tuple(_CLASSES)
READS_A_MODEL = ("probe", "cpx")
READS_AN_ENCODER = ("embed", "text+embed")
"""Kinds with a model of their own, which a router does not answer with."""
DEFAULT_ENCODER = "minilm"
_DROPPED = {
    # benchmarks/results/routing_nano.json: an APGR below that of cpx, on both test sets.
    "cpx+text": "Pliant dropped it, because 'cpx' was better: fit the router again with 'cpx'",
    # benchmarks/results/routing_labels.json: 'text' has been ahead of all three since.
    **dict.fromkeys(
        ("pair", "tfidf-ridge", "tfidf-logistic"),
        "Pliant dropped it, because 'text' was better: fit the router again with 'text'",
    ),
}

ENTRY_POINTS = "pliant.scorers"
_registered: dict[str, type[Scorer]] = {}

__all__ = [
    "KINDS",
    "DEFAULT_ENCODER",
    "READS_A_MODEL",
    "READS_AN_ENCODER",
    "Prefilling",
    "Predictions",
    "Scorer",
    "kind_class",
    "load",
    "make",
    "read_index",
    "register",
]


def make(kind: str, **settings: Any) -> Scorer:
    """A new scorer, to be fitted."""
    return kind_class(kind)(**settings)


def load(folder: str | Path, device: str | None = None, **settings: Any) -> Scorer:
    """A saved scorer of any kind; one that reads a model, or whose members do, reads it on the
    device."""
    from pliant.routing.scorers.corrections import CORRECTIONS, Corrections, WithCorrections
    from pliant.routing.scorers.known_grams import KNOWN_GRAMS, KnownGrams
    from pliant.routing.scorers.novelty import NOVELTY, NoveltyDetector, WithNovelty

    path = Path(folder)
    index = read_index(path)
    kind = index["kind"]
    # A router's file cannot name what is imported: that would run its author's code.
    if ":" in kind or _known(kind) is None:
        own = "it is not one of Pliant's own: name its class first (--scorer MODULE:CLASS, or "
        reason = _DROPPED.get(kind, f"{own}pliant.routing.scorers.register)")
        raise CorruptFile(f"{path}: a scorer of kind {kind!r}: {reason}")
    try:
        placed = {} if device is None else _placed(index, device)
        scorer = kind_class(kind).load(path, **placed, **settings)
    except PliantError:
        raise
    except (LookupError, ValueError) as error:
        raise CorruptFile(f"{path}: not what Pliant writes ({error!r})") from error
    except (AttributeError, TypeError) as error:
        raise CorruptFile(f"{path}: not what Pliant writes (a value of another type)") from error
    if (path / NOVELTY).is_file():
        scorer = WithNovelty(scorer, NoveltyDetector.load(path))
    elif (path / KNOWN_GRAMS).is_file():
        scorer = WithNovelty(scorer, KnownGrams.load(path))
    if (path / CORRECTIONS).is_file():
        scorer = WithCorrections(scorer, Corrections.load(path))
    return scorer


def _placed(index: Mapping[str, Any], device: str) -> dict[str, Any]:
    """What a scorer of Pliant's own is loaded with to read its model on this device."""
    from pliant.routing.scorers.base_model import BaseLM

    if index["kind"] == "stack":
        return {"device": device}
    base = index["settings"].get("base")
    return {} if base is None or index["kind"] not in KINDS else {"base": BaseLM(base, device)}


def register(scorer: type[Scorer]) -> type[Scorer]:
    """Make the kind of your own scorer known, so that routers with it can be fitted and loaded."""
    is_scorer = isinstance(scorer, type) and issubclass(scorer, Scorer)
    kind = getattr(scorer, "kind", None)
    if not is_scorer or not isinstance(kind, str) or ":" in kind or kind in _CLASSES:
        name = getattr(scorer, "__name__", repr(scorer))
        raise InvalidInput(
            f"{name} cannot be registered as a scorer: it must be a subclass of "
            "pliant.routing.scorers.Scorer with a `kind` of its own"
        )
    _registered[kind] = scorer
    return scorer


def kind_class(kind: str) -> type[Scorer]:
    """The class of a kind, or of `module:Class` or `file.py:Class`, which is imported and
    registered; the error about an unknown kind names those like it."""
    if kind in _DROPPED:
        raise InvalidInput(f"no scorer is called {kind!r}: {_DROPPED[kind]}")
    if ":" in kind:
        from pliant.verify.custom import import_function

        return register(import_function(kind))  # type: ignore[arg-type]
    scorer = _known(kind)
    if scorer is None:
        near = did_you_mean(kind, [*KINDS, *_registered])
        raise InvalidInput(f"no scorer is called {kind!r}{near}")
    return scorer


def _known(kind: str) -> type[Scorer] | None:
    """The class of Pliant's own kinds, of registered ones, and of those of installed packages."""
    if kind in _CLASSES:
        module, name = _CLASSES[kind]
        scorer: type[Scorer] = getattr(import_module(f"pliant.routing.scorers.{module}"), name)
        return scorer
    if kind not in _registered:
        for entry in entry_points(group=ENTRY_POINTS, name=kind):
            register(entry.load())
    return _registered.get(kind)
