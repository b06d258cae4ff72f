"""trl's trainers, training on selected tokens; trl is imported when one of them is.

    from pliant.gradients.trl import SelectiveSFTTrainer
    SelectiveSFTTrainer("nano-s", train_dataset=rows, selective=GradientConfig(ratio=0.25))

There is one for each trainer whose loss is a function of the tokens' log-probabilities. Only the
selected tokens have a gradient, each times its weight; the values are those of all tokens, so the
logged loss, the entropies and the accuracies are trl's own.
"""

from __future__ import annotations

from typing import Any

from pliant.errors import InvalidInput
from pliant.gradients.training import SelectiveMixin

PLAIN = {
    "SelectiveSFTTrainer": "SFTTrainer",
    "SelectiveDPOTrainer": "DPOTrainer",
    "SelectiveGRPOTrainer": "GRPOTrainer",
    "SelectiveRLOOTrainer": "RLOOTrainer",
    "SelectiveKTOTrainer": "KTOTrainer",
}
__all__ = list(PLAIN)


def __getattr__(name: str) -> Any:
    if name not in PLAIN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import trl
    except ImportError as error:
        raise InvalidInput(f"{name} needs trl: pip install 'pliant[rl]'") from error
    plain = getattr(trl, PLAIN[name])
    about = {"__doc__": f"trl's {PLAIN[name]}, selective.", "__module__": __name__}
    globals()[name] = type(name, (SelectiveMixin, plain), about)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *PLAIN])
