"""Structure: gates on heads, channels, experts of a mixture and layers; pruning that removes them.

`units` lists the parts of a model that can be gated, `config` holds the settings, and `gates`
scales them while the model stays as it is. `importance` ranks them on `calibration` text:
`measures` has a function for each score, `meters` the hooks that some of them set, and `entropy`
how evenly heads attend. `prune` closes gates and gives the rest new weights (`compensation`, by
`least_squares`, and whole `layers` by the one before); `plan` divides a budget over the parts by
`trials` and their `costs`; `close_experts` lets routers choose among the `remaining_experts` alone.
`export` removes what is closed and writes a `smaller` stock model; `layouts` say how units lie in
its tensors. `disk_export` does so for a `disk_model` that is larger than memory, by a `disk_plan`,
in `shards`, from `saved` gates; both make tensors on demand (`lazy_state`). `recovery` trains the
smaller model (its `trained_weights`), with `distillation` from the whole one. `controller` learns
which gates to close, within a `budget`; `plasticity` opens some heads again while the model trains;
`agency` gives heads a state and a consent; `skips` adds the outputs of early layers to those of
late ones. `facade` is the interface of Sentinel.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pliant.structure.agency import Agency, AgencyReport, attach_agency
from pliant.structure.calibration import calibration_batches, perplexity
from pliant.structure.close_experts import ClosedExperts, close_experts
from pliant.structure.config import AgencyConfig, GateConfig, PruneConfig
from pliant.structure.controller import Controller, ControllerConfig
from pliant.structure.disk_export import export_from_disk
from pliant.structure.export import ExportResult, export
from pliant.structure.gates import Gates, attach
from pliant.structure.importance import Importance, ImportanceConfig, importance
from pliant.structure.plan import Plan, PlanConfig, plan_pruning
from pliant.structure.prune import Pruned, prune
from pliant.structure.remaining_experts import RemainingExperts, RemainingExpertsConfig
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
    from pliant.structure.recovery import RecoveryConfig, RecoveryResult, recover

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
    "pliant.structure.recovery": ("RecoveryConfig", "RecoveryResult", "recover"),
}


def __getattr__(name: str) -> Any:
    for home, names in _TRAINED.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
