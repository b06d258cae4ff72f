"""Pliant makes any causal language model spend its compute where it matters.

The public names are found when they are first used: `import pliant` imports neither torch nor
transformers, so that the command line can answer `--help` in the time it takes to type it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    # What type checkers and editors see: the same names as _HOMES (a test compares the two).
    from pliant import route as route
    from pliant.adapters import Adapter as Adapter
    from pliant.adapters import attached as attached
    from pliant.anatomy import Anatomy as Anatomy
    from pliant.anatomy.depth import run_first as run_first
    from pliant.attaching import attach as attach
    from pliant.complexity.config import CPXConfig as CPXConfig
    from pliant.complexity.facade import CPXCausalLM as CPXCausalLM
    from pliant.complexity.facade import CPXMistralConfig as CPXMistralConfig
    from pliant.complexity.facade import CPXMistralDatasetConfig as CPXMistralDatasetConfig
    from pliant.complexity.facade import CPXMistralTokenizer as CPXMistralTokenizer
    from pliant.complexity.facade import MistralTrainingConfig as MistralTrainingConfig
    from pliant.complexity.model import Complexity as Complexity
    from pliant.complexity.tokenizer import CPXTokenizer as CPXTokenizer
    from pliant.complexity.training.config import CPXDatasetConfig as CPXDatasetConfig
    from pliant.complexity.training.config import CPXTrainingConfig as CPXTrainingConfig
    from pliant.complexity.training.trainer import CPXTrainer as CPXTrainer
    from pliant.errors import AdapterError as AdapterError
    from pliant.errors import CorruptFile as CorruptFile
    from pliant.errors import InvalidInput as InvalidInput
    from pliant.errors import ModelNotFound as ModelNotFound
    from pliant.errors import PliantError as PliantError
    from pliant.errors import UnsupportedModel as UnsupportedModel
    from pliant.errors import WrongBase as WrongBase
    from pliant.experts.facade.interpolation import (
        compute_cem_interpolation as compute_cem_interpolation,
    )
    from pliant.experts.facade.ppo import SVF_PPOTrainer as SVF_PPOTrainer
    from pliant.experts.facade.svd import SvdComponent as SvdComponent
    from pliant.experts.facade.svd import SVFWrapper as SVFWrapper
    from pliant.gradients.facade.causal_lm import CGGRModel as CGGRModel
    from pliant.gradients.facade.flash import enable_flash_attention as enable_flash_attention
    from pliant.gradients.facade.flash import (
        load_model_with_flash_attention as load_model_with_flash_attention,
    )
    from pliant.gradients.facade.loss import CGGRLoss as CGGRLoss
    from pliant.gradients.facade.scorer import CGGRScorer as CGGRScorer
    from pliant.gradients.facade.scorer import create_truncated_router as create_truncated_router
    from pliant.loading import load as load
    from pliant.routing.live.decision import Decision as Decision
    from pliant.routing.live.decision import Reply as Reply
    from pliant.routing.outcomes import Outcomes as Outcomes
    from pliant.routing.router import Router as Router
    from pliant.structure.facade.adaptive_model import AdaptiveModel as AdaptiveModel
    from pliant.structure.facade.adaptive_model import load_adaptive_model as load_adaptive_model
    from pliant.structure.facade.adaptive_model import load_baseline_model as load_baseline_model
    from pliant.training import AdapterCheckpoint as AdapterCheckpoint

# Which module each public name lives in.
_HOMES = {
    "pliant": ("route",),
    "pliant.adapters": ("Adapter", "attached"),
    "pliant.anatomy": ("Anatomy",),
    "pliant.anatomy.depth": ("run_first",),
    "pliant.attaching": ("attach",),
    "pliant.complexity.config": ("CPXConfig",),
    "pliant.complexity.facade": (
        "CPXCausalLM",
        "CPXMistralConfig",
        "CPXMistralDatasetConfig",
        "CPXMistralTokenizer",
        "MistralTrainingConfig",
    ),
    "pliant.complexity.model": ("Complexity",),
    "pliant.complexity.tokenizer": ("CPXTokenizer",),
    "pliant.complexity.training.trainer": ("CPXTrainer",),
    "pliant.complexity.training.config": ("CPXDatasetConfig", "CPXTrainingConfig"),
    "pliant.errors": (
        "AdapterError",
        "CorruptFile",
        "InvalidInput",
        "ModelNotFound",
        "PliantError",
        "UnsupportedModel",
        "WrongBase",
    ),
    "pliant.experts.facade.ppo": ("SVF_PPOTrainer",),
    "pliant.experts.facade.svd": ("SVFWrapper", "SvdComponent"),
    "pliant.experts.facade.interpolation": ("compute_cem_interpolation",),
    "pliant.gradients.facade.causal_lm": ("CGGRModel",),
    "pliant.gradients.facade.flash": ("enable_flash_attention", "load_model_with_flash_attention"),
    "pliant.gradients.facade.loss": ("CGGRLoss",),
    "pliant.gradients.facade.scorer": ("CGGRScorer", "create_truncated_router"),
    "pliant.loading": ("load",),
    "pliant.routing.live.decision": ("Decision", "Reply"),
    "pliant.routing.outcomes": ("Outcomes",),
    "pliant.routing.router": ("Router",),
    "pliant.structure.facade.adaptive_model": (
        "AdaptiveModel",
        "load_adaptive_model",
        "load_baseline_model",
    ),
    "pliant.training": ("AdapterCheckpoint",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pliant' has no attribute {name!r}")
    home = _HOME_OF[name]
    # A home of "pliant" means a module, whose functions are called by its name: pliant.route.fit.
    is_module = home == "pliant"
    value = import_module(f"pliant.{name}") if is_module else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
