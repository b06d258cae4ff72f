"""transformers' TrainingArguments from `name=value` texts."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments, get_scheduler

from pliant.errors import InvalidInput, did_you_mean
from pliant.options import unusable

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
    "weight_decay": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "seed": 0,
    "data_seed": 0,
    "neftune_noise_alpha": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
}
"""Below these, the Trainer fails only after the model is loaded."""
REPORTERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""The packages of logs, of which one is enough."""
RESERVED = {
    *("output_dir", "resume_from_checkpoint", "label_smoothing_factor", "disable_tqdm"),
    "push_to_hub",  # before the run ends, there is no model to push
}
SECRET = ("hub_token", "push_to_hub_token")
"""What the Trainer would write into its files."""
NO_TOKEN = (
    "a token would be written into files beside the model; set HF_TOKEN in the environment, or log "
    "in once (hf auth login)"
)


def training_arguments(folder: Path, settings: Mapping[str, str]) -> TrainingArguments:
    """transformers' own arguments, parsed as its command line would."""
    names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name in settings:
        if name in SECRET:
            raise InvalidInput(f"--set {name}: {NO_TOKEN}")
        if name in RESERVED:
            raise InvalidInput(f"--set {name}: this is settled by pliant train itself")
        if name not in names:
            near = did_you_mean(name, sorted(names))
            raise InvalidInput(f"--set {name}: TrainingArguments has none{near}")
    flags = ["--output_dir", str(folder), "--disable_tqdm", "true"]
    for name, value in {**DEFAULTS, **settings}.items():
        flags += [f"--{name}", value]
    check_reporters([name.strip() for name in settings.get("report_to", "none").split(",")])
    parser = HfArgumentParser(TrainingArguments)
    parser.error = _refuse
    try:
        (args,) = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except InvalidInput:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise InvalidInput(f"--set: {one_line(error)}") from error
    for name, text in settings.items():
        value = getattr(args, name)
        if problem := unusable(value):
            raise InvalidInput(f"--set {name}={text}: {problem}")
        if name in MINIMUM and value is not None and not value >= MINIMUM[name]:
            raise InvalidInput(f"--set {name}={text}: give {MINIMUM[name]} or more")
    _check_optimizer(args)
    if args.save_total_limit == 1:
        raise InvalidInput(
            "--set save_total_limit=1: the last checkpoint would be removed before the next is "
            "complete. Keep 2 or more"
        )
    return args


def refuse_tokens(args: TrainingArguments) -> None:
    """Each checkpoint of a Trainer holds all its arguments (training_args.bin)."""
    for name in SECRET:
        if getattr(args, name, None):
            raise InvalidInput(f"{name}: {NO_TOKEN}")


def _check_optimizer(args: TrainingArguments) -> None:
    """Refuse settings with which the Trainer would fail to make its optimizer and its schedule."""
    if any(kind in str(args.optim) for kind in ("lomo", "galore", "apollo")):
        return  # made for the modules of a model
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **options)
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs or {},
        )
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
        raise InvalidInput(
            f"--set: no optimizer or schedule can be made from these settings: {one_line(error)}"
        ) from error


def check_reporters(names: Sequence[str]) -> None:
    """Refuse a log that transformers does not know, or whose package is missing: the Trainer
    reports that when the model is loaded already."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            near = did_you_mean(name, [*sorted(INTEGRATION_TO_CALLBACK), "none"])
            raise InvalidInput(f"report_to = {name!r}: there is no such log{near}")
        packages = REPORTERS.get(name)
        if packages and not any(find_spec(package) for package in packages):
            raise InvalidInput(
                f"report_to = {name!r}: {name} is not installed: pip install {packages[0]}"
            )


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _refuse(message: str) -> NoReturn:
    name = re.sub(r"argument --(\w+)[^:]*", r"\1", message)
    raise InvalidInput(f"--set: {name}") from sys.exception()
