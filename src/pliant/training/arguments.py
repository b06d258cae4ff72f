"""Settings as `name=value` texts: transformers' TrainingArguments, or a dataclass of Pliant's."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError
from transformers import HfArgumentParser, TrainingArguments

from pliant.data import nearest
from pliant.errors import InvalidInput

Settings = TypeVar("Settings")
DEFAULTS = {
    "logging_steps": "10",
    "save_steps": "50",
    "save_total_limit": "2",
    "num_train_epochs": "1",
    "report_to": "none",
}
"""Where they differ from transformers' own."""
MINIMUM = {
    "learning_rate": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
}
"""Below these, the Trainer fails only after the model is loaded."""
RESERVED = ("output_dir", "resume_from_checkpoint", "label_smoothing_factor", "disable_tqdm")


def pairs(texts: Iterable[str], option: str) -> dict[str, str]:
    """`name=value` texts as a dict; each name once, dashes as underscores."""
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise InvalidInput(f"{option} {text!r}: write it as name=value")
        if name in values:
            raise InvalidInput(f"{option} {name} is given twice")
        values[name] = value.strip()
    return values


def training_arguments(folder: Path, settings: Mapping[str, str]) -> TrainingArguments:
    """transformers' own arguments, parsed as its command line would."""
    names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in settings:
        if name in RESERVED:
            raise InvalidInput(f"--set {name}: this is settled by pliant train itself")
        if name not in names:
            near = nearest(name, sorted(names))
            raise InvalidInput(f"--set {name}: TrainingArguments has none{near}")
    flags = ["--output_dir", str(folder), "--disable_tqdm", "true"]
    for name, value in {**DEFAULTS, **settings}.items():
        flags += [f"--{name}", value]
    parser = HfArgumentParser(TrainingArguments)
    parser.error = _refuse
    try:
        (args,) = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except InvalidInput:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise InvalidInput(f"--set: {one_line(error)}") from error
    for name, minimum in MINIMUM.items():
        if not getattr(args, name) >= minimum:
            raise InvalidInput(f"--set {name}={settings[name]}: give {minimum} or more")
    if args.save_total_limit == 1:
        raise InvalidInput(
            "--set save_total_limit=1: the last checkpoint would be removed before the next is "
            "complete. Keep 2 or more"
        )
    return args


def from_pairs(
    kind: type[Settings], texts: Mapping[str, str], option: str, **options: Any
) -> Settings:
    """A dataclass from texts and from fields that have an option of their own (None: not set)."""
    hints = get_type_hints(kind)
    values = {name: value for name, value in options.items() if value is not None}
    for name, text in texts.items():
        if name not in hints:
            raise InvalidInput(f"{option} {name}: there is none{nearest(name, sorted(hints))}")
        try:
            value = None if text == "none" else text
            values[name] = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise InvalidInput(f"{option} {name}={text}: {message}") from None
    return kind(**values)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _refuse(message: str) -> NoReturn:
    name = re.sub(r"argument --(\w+)[^:]*", r"\1", message)
    raise InvalidInput(f"--set: {name}") from sys.exception()
