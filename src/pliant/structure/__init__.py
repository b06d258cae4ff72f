"""Structure: gates on heads, channels, experts of a mixture and layers; pruning that removes them.

`units` lists the parts of a model that can be gated, `config` holds the settings, and `gates`
scales them while the model stays as it is. `ranking` measures how much each unit matters on
`calibration` text, and `pruning` closes gates and gives the rest new weights, within a budget over
all parts. `exporting` writes what remains as a `stock` model, and `recovery` trains that.

`controller` learns which gates to close, within a `budget`; `plasticity` opens some heads again
while the model trains; `agency` gives heads a state and a consent, from their `entropy` among other
things; `skips` adds the outputs of early layers to those of late ones. `facade` is the interface of
Sentinel, and `generation_check` its script.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pliant.structure.agency import Agency, AgencyReport, attach_agency
from pliant.structure.calibration import calibration_batches, perplexity
from pliant.structure.config import AgencyConfig, GateConfig, PruneConfig
from pliant.structure.controller import Controller, ControllerConfig
from pliant.structure.exporting.disk_export import export_from_disk
from pliant.structure.exporting.export import ExportResult, export
from pliant.structure.gates import Gates, attach
from pliant.structure.pruning.close_experts import ClosedExperts, close_experts
from pliant.structure.pruning.plan import Plan, PlanConfig, plan_pruning
from pliant.structure.pruning.prune import prune
from pliant.structure.pruning.pruned import Pruned
from pliant.structure.pruning.remaining_experts import RemainingExperts, RemainingExpertsConfig
from pliant.structure.ranking.importance import Importance, ImportanceConfig, importance
from pliant.structure.skips import SkipConfig, Skips
from pliant.structure.skips import attach as attach_skips
from pliant.structure.units import Site, sites_of

if TYPE_CHECKING:
    from pliant.structure.plasticity import (
        Plasticity,
        PlasticityConfig,
        PlasticityResult,
        Regrowth,
        SleepConfig,
        SleepResult,
        attach_plasticity,
        compare_regrowth,
        make_plastic,
    )
    from pliant.structure.plasticity.sleep import sleep
    from pliant.structure.recovery import (
        RecoveryConfig,
        RecoveryResult,
        recover,
        recover_gated,
    )

__all__ = [
    "Agency",
    "AgencyConfig",
    "AgencyReport",
    "ClosedExperts",
    "Controller",
    "ControllerConfig",
    "ExportResult",
    "GateConfig",
    "Gates",
    "Importance",
    "ImportanceConfig",
    "Plan",
    "PlanConfig",
    "Plasticity",
    "PlasticityConfig",
    "PlasticityResult",
    "PruneConfig",
    "Pruned",
    "RecoveryConfig",
    "RecoveryResult",
    "Regrowth",
    "RemainingExperts",
    "RemainingExpertsConfig",
    "Site",
    "SleepConfig",
    "SleepResult",
    "SkipConfig",
    "Skips",
    "attach",
    "attach_agency",
    "attach_plasticity",
    "attach_skips",
    "calibration_batches",
    "close_experts",
    "compare_regrowth",
    "export",
    "export_from_disk",
    "importance",
    "make_plastic",
    "perplexity",
    "plan_pruning",
    "prune",
    "recover",
    "recover_gated",
    "sites_of",
    "sleep",
]

# They import transformers' Trainer, which takes seconds and says things about other libraries.
_TRAINED = {
    "pliant.structure.plasticity": (
        "Plasticity",
        "PlasticityConfig",
        "PlasticityResult",
        "Regrowth",
        "SleepConfig",
        "SleepResult",
        "attach_plasticity",
        "compare_regrowth",
        "make_plastic",
        "sleep",
    ),
    "pliant.structure.recovery": (
        "RecoveryConfig",
        "RecoveryResult",
        "recover",
        "recover_gated",
    ),
}


def __getattr__(name: str) -> Any:
    for home, names in _TRAINED.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
