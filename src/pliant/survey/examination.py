"""What Pliant can do with one model, from its config alone: no weights are read or made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pliant.anatomy import Anatomy
from pliant.errors import UnsupportedModel
from pliant.survey.capability import ask, by_part
from pliant.survey.sizes import Estimate, Sizes, estimates_of, sizes_of
from pliant.survey.specimen import Specimen


@dataclass(frozen=True)
class Finding:
    """One capability's answer for one model."""

    part: str
    name: str
    question: str
    ok: bool
    reason: str


@dataclass(frozen=True)
class Examination:
    """Sizes read off the shapes, capabilities measured on a tiny copy, memory by formula."""

    model_type: str
    architecture: str
    transformers_version: str
    sizes: Sizes | None
    """None where the layers are not found: the finding "layers" says why."""
    findings: tuple[Finding, ...]
    estimates: tuple[Estimate, ...]


def examine(config: PreTrainedConfig) -> Examination:
    """Examine the causal LM that this config describes, whatever its size."""
    model = without_weights(config)
    sizes, estimates = _measured(model)
    answers = ask(Specimen(config))
    return Examination(
        model_type=config.model_type,
        architecture=type(model).__name__,
        transformers_version=transformers.__version__,
        sizes=sizes,
        findings=tuple(
            Finding(c.part, c.name, c.question, answers[c.name].ok, answers[c.name].reason)
            for c in by_part()
        ),
        estimates=estimates,
    )


def _measured(model: PreTrainedModel) -> tuple[Sizes | None, tuple[Estimate, ...]]:
    try:
        anatomy = Anatomy.of(model)
    except UnsupportedModel:
        return None, ()
    sizes = sizes_of(anatomy)
    return sizes, estimates_of(anatomy, sizes)


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: every shape, no memory."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        raise UnsupportedModel(
            f"a model of type {config.model_type!r} is no causal language model: transformers "
            f"{transformers.__version__} maps no AutoModelForCausalLM to it."
        )
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except Exception as error:  # whatever a model's constructor may raise
        said = " ".join(str(error).split())[:300]
        raise UnsupportedModel(
            f"transformers {transformers.__version__} cannot build a {config.model_type!r} model "
            f"from this config: {type(error).__name__}: {said}"
        ) from error
