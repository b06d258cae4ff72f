"""The [CPX] token: score a prompt from the prefill it needs anyway.

`config` is what a user may set, `model` the scorer on its base, `generation` how it scores while
the base generates, `training` how it learns, `export` how it leaves; `prompts` and `scores` are
what goes in and comes out. What these are made of: `rows` runs at the [CPX] positions, `stored`
keeps the prompts' keys and values, `leaving` serves export. `facade` is
the interface of code that was written before.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pliant.complexity.config import CPXConfig
    from pliant.complexity.model import Complexity, attach
    from pliant.complexity.scores import Scores
    from pliant.complexity.training.fit import fit, remember
    from pliant.complexity.training.trainer import CPXTrainer

__all__ = ["CPXConfig", "CPXTrainer", "Complexity", "Scores", "attach", "fit", "remember"]

_MODULES = {
    "CPXConfig": "config",
    "Complexity": "model",
    "Scores": "scores",
    "attach": "model",
    "CPXTrainer": "training.trainer",
    "fit": "training.fit",
    "remember": "training.fit",
}
"""Settings need no torch, and scoring no Trainer: each takes seconds to import."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
