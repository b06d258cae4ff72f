"""Tiny random models of every causal-LM type: the same structure, a hundred thousand parameters."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pliant.anatomy.shrink_config import shrink

OVERRIDES: dict[str, dict[str, dict[str, Any]]] = json.loads(
    (resources.files(__package__) / "tiny_overrides.json").read_text()
)


def causal_lm_types() -> list[str]:
    """Every model type that transformers maps to a causal LM."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def variants() -> list[str]:
    """Names of further structures that some types can have: `gemma4_text+shared_keys`, ..."""
    types = causal_lm_types()
    return [name for name in OVERRIDES["variants"] if name.partition("+")[0] in types]


def tiny_config(config: PreTrainedConfig | str) -> PreTrainedConfig:
    """A config of the same structure with tiny sizes; a type's name means its default config."""
    changes: dict[str, Any] = {}
    if isinstance(config, str):
        changes = OVERRIDES["variants"].get(config, {})
        config = default_config(config.partition("+")[0])
    sizes = config.to_dict()
    sizes.pop("quantization_config", None)
    tiny = merged(shrink(sizes), OVERRIDES["sizes"].get(config.model_type, {}))
    return type(config).from_dict(merged(tiny, changes))


def default_config(model_type: str) -> PreTrainedConfig:
    """The type's default config, completed where it would not make a causal LM."""
    config: PreTrainedConfig = CONFIG_MAPPING[model_type](
        **OVERRIDES["arguments"].get(model_type, {})
    )
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True  # BERT's family looks both ways unless told otherwise
    return config


def tiny_model(
    config: PreTrainedConfig | str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """A tiny random causal LM of the config's structure, in eval mode, the same for one seed."""
    tiny = tiny_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny, dtype=dtype)
        _disturb(model)
    return model.eval()


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The config with the changes made, section by section."""
    result = dict(config)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def _disturb(model: PreTrainedModel) -> None:
    """A law that holds because a bias is zero proves nothing: no parameter stays at a constant."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.02 * torch.randn_like(parameter)
