"""The [CPX] token: score a prompt from the prefill it needs anyway.

`config` holds the settings, `scorer` the scorer on its base, and `model` adds generation (scored
from its own prefill) and export. `prompts` and `scores` are the input and output. `tokenizer` ends
prompts in [CPX]; `rows` holds what acts at its positions; `prefix_cache` stores the prompts' keys
and values; `training` trains a scorer; `export` writes it with its base as a `stock` model;
`facade` is the interface of the CPX wrapper.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pliant.complexity.config import CPXConfig
    from pliant.complexity.model import Complexity, attach
    from pliant.complexity.scores import Scores
    from pliant.complexity.training.run import fit, remember
    from pliant.complexity.training.trainer import CPXTrainer

__all__ = ["CPXConfig", "CPXTrainer", "Complexity", "Scores", "attach", "fit", "remember"]

_MODULES = {
    "CPXConfig": "config",
    "Complexity": "model",
    "Scores": "scores",
    "attach": "model",
    "CPXTrainer": "training.trainer",
    "fit": "training.run",
    "remember": "training.run",
}
"""Settings need no torch, and scoring no Trainer: each takes seconds to import."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
