"""A LoRA as a model: its base, with the matrices merged into the weights in memory.

It is a folder that PEFT wrote (`adapter_config.json`), or a repository with such a file on the hub.
Its base is what that file names, by any name that Pliant knows. Neither is changed on the disk.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.errors import InvalidInput, ModelNotFound, PliantError
from pliant.loading import hub
from pliant.loading.names import LORA_CONFIG, Source, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERT = "SVF"
"""PEFT's type of Pliant's own experts."""


def base_of(source: Source) -> str:
    """The name of the base that the LoRA in this folder was trained on."""
    path = Path(source.location) / LORA_CONFIG
    try:
        config = json.loads(path.read_bytes())
        kind, base = config["peft_type"], config["base_model_name_or_path"]
        assert isinstance(base, str) and base
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise ModelNotFound(
            f"{source} holds a damaged {LORA_CONFIG}: it names no peft_type or no "
            "base_model_name_or_path"
        ) from error
    if kind == EXPERT:
        raise ModelNotFound(
            f"{source} is an expert, not a model: `pliant expert merge {source.name} --out merged` "
            f"writes it as one, and `pliant expert ask --experts {source.name}` asks it"
        )
    try:
        is_lora = hub.with_lora(resolve(base)).kind == "lora"
    except PliantError as error:
        raise _without_base(source, base, error) from error
    if is_lora:
        raise ModelNotFound(
            f"{source} is a LoRA of {base!r}, which is a LoRA itself: name a whole model in "
            f"base_model_name_or_path of {path}"
        )
    return base


def of_base(source: Source, load: Callable[[str], Any]) -> Any:
    """What `load` returns for the LoRA's base."""
    base = base_of(source)
    try:
        return load(base)
    except ModelNotFound as error:
        raise _without_base(source, base, error) from error


def merged(source: Source, base: Any) -> PreTrainedModel:
    """The base, with what the LoRA adds to its weights."""
    from peft import PeftModel

    if getattr(base, "hf_quantizer", None) is not None:
        raise InvalidInput(
            f"{source} is a LoRA, and merging it into a quantised base would lose precision: load "
            f"the base, and then peft.PeftModel.from_pretrained(base, {source.name!r})"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        model = PeftModel.from_pretrained(base, source.location)
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ModelNotFound(
            f"{source} is an adapter of type {model.active_peft_config.peft_type}, which cannot be "
            "merged into a model"
        )
    whole: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    # What is made on this model names the folder, and not the base alone.
    name = source.name_on_hub or os.path.abspath(source.location)
    whole.name_or_path = whole.config._name_or_path = name
    return whole


def _without_base(source: Source, base: str, error: PliantError) -> ModelNotFound:
    path = Path(source.location) / LORA_CONFIG
    return ModelNotFound(
        f"{source} is a LoRA of {base!r}, and its base cannot be loaded: {error}. If it lies "
        f"elsewhere, put its place in base_model_name_or_path of {path}"
    )
