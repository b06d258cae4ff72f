"""Train where it matters: the tokens of a batch that are worth a gradient, and only those backward.

`config` holds the settings, `model` what attaches, `training` the same under a Trainer, and `audit`
whether it helps. These build on `labelled_batch` (the arguments of a call), `selector` (which
tokens and how many, by the rules of `selection`), `engines` (their loss alone) and
`telemetry`. `selective_run` is `pliant train lm`; `facade` is the interface of the cggr package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pliant.gradients.config import GradientConfig
from pliant.gradients.model import Gradients, GradientsWarning, attach

if TYPE_CHECKING:
    from pliant.gradients.training import SelectiveMixin, SelectiveTraining, make_selective

__all__ = [
    "GradientConfig",
    "Gradients",
    "GradientsWarning",
    "SelectiveMixin",
    "SelectiveTraining",
    "attach",
    "make_selective",
]

_LATER = ("SelectiveMixin", "SelectiveTraining", "make_selective")
"""A loop of one's own needs no Trainer, which takes seconds to import."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.training"), name)
