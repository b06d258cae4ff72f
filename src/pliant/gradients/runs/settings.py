"""What is set by `name=value`: any of transformers' TrainingArguments, any of a GradientConfig."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from pydantic import TypeAdapter, ValidationError
from transformers import HfArgumentParser, TrainingArguments

from pliant.errors import InvalidInput
from pliant.gradients.config import GradientConfig

OURS = {
    "logging_steps": "10",
    "save_steps": "50",
    "save_total_limit": "2",
    "num_train_epochs": "1",
    "report_to": "none",
}
"""Where they differ from transformers' own."""
LEAST = {
    "learning_rate": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
}
"""What the Trainer would trip over once the model is loaded."""
FIXED = ("output_dir", "resume_from_checkpoint", "label_smoothing_factor", "disable_tqdm")


def pairs(given: Iterable[str], option: str) -> dict[str, str]:
    """`name=value`, each name once, with underscores."""
    found: dict[str, str] = {}
    for one in given:
        name, equals, value = one.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise InvalidInput(f"{option} {one!r}: write it as name=value")
        if name in found:
            raise InvalidInput(f"{option} {name} is given twice")
        found[name] = value.strip()
    return found


def arguments(folder: Path, given: Mapping[str, str]) -> TrainingArguments:
    """transformers' own arguments, parsed as its command line would."""
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in given:
        if name in FIXED:
            raise InvalidInput(f"--set {name}: this is settled by pliant train itself")
        if name not in known:
            raise InvalidInput(f"--set {name}: TrainingArguments has none{_near(name, known)}")
    words = ["--output_dir", str(folder), "--disable_tqdm", "true"]
    for name, value in {**OURS, **given}.items():
        words += [f"--{name}", value]
    parser = HfArgumentParser(TrainingArguments)
    parser.error = _refuse
    try:
        (made,) = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except InvalidInput:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise InvalidInput(f"--set: {_line(error)}") from error
    for name, least in LEAST.items():
        if not getattr(made, name) >= least:
            raise InvalidInput(f"--set {name}={given[name]}: give {least} or more")
    if made.save_total_limit == 1:
        raise InvalidInput(
            "--set save_total_limit=1: the last checkpoint would be removed before the next is "
            "whole. Keep 2 or more"
        )
    return made


def gradient_config(given: Mapping[str, str], **ours: Any) -> GradientConfig:
    """A configuration from texts, and from what has its own option."""
    kinds = get_type_hints(GradientConfig)
    values: dict[str, Any] = {k: v for k, v in ours.items() if v is not None}
    for name, text in given.items():
        if name not in kinds:
            raise InvalidInput(f"--choose {name}: there is none{_near(name, kinds)}")
        try:
            value: Any = None if text == "none" else text
            values[name] = TypeAdapter(kinds[name]).validate_python(value)
        except ValidationError as error:
            said = error.errors()[0]["msg"]
            raise InvalidInput(f"--choose {name}={text}: {said}") from None
    return GradientConfig(**values)


def _refuse(message: str) -> NoReturn:
    name = re.sub(r"argument --(\w+)[^:]*", r"\1", message)
    raise InvalidInput(f"--set: {name}") from sys.exception()


def _near(name: str, known: Iterable[str]) -> str:
    from pliant.data import nearest

    return nearest(name, sorted(known))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
