"""Open what a router's file names: its models and its scorer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pliant.errors import InvalidInput
from pliant.routing import scorers
from pliant.routing.backends import Backend, ModelSpec, Retry, open_backend
from pliant.routing.router_file import ModelEntry, RouterFile
from pliant.routing.scorers import Scorer
from pliant.routing.scorers.base_model import BaseLM
from pliant.routing.scorers.protocol import read_index

AT_ONCE = 64  # calls of one URL at a time


def open_model(entry: ModelEntry, device: str | None = None, *, patient: bool = False) -> Backend:
    """Open a model by its entry.

    A call of a URL is tried once unless the entry says otherwise, because another model can stand
    in. A `patient` one, for prompts that no other model takes, is tried as often as in labelling.
    """
    spec = ModelSpec.parse(entry.backend)
    options: dict[str, Any] = {"device": device}
    if spec.url is not None:
        tries = entry.tries or (None if patient else 1)
        options = {
            "context_tokens": entry.context,
            "concurrency": AT_ONCE,
            "key_env": entry.key_env,
            "timeout": entry.timeout,
            "retry": None if tries is None else Retry(tries=tries),
        }
        options = {name: value for name, value in options.items() if value is not None}
    return open_backend(ModelSpec(entry.name, spec.model, spec.url), **options)


def is_remote(entry: ModelEntry) -> bool:
    """Whether a model is behind a URL."""
    return ModelSpec.parse(entry.backend).url is not None


def open_scorer(folder: Path, file: RouterFile, device: str | None = None) -> Scorer:
    """The scorer in a router's folder; one that reads a model reads it on the given device."""
    place = folder / file.scorer.folder
    index = read_index(place)
    kind = index["kind"]
    if kind != file.scorer.kind:
        raise InvalidInput(
            f"{place}: holds a scorer of kind {kind!r}, and router.json says {file.scorer.kind!r}: "
            "fit the router again, or put back the scorer that belongs to it"
        )
    base = index["settings"].get("base")
    if base is not None and device is not None and kind in scorers.KINDS:
        return scorers.load(place, base=BaseLM(base, device))
    return scorers.load(place)
