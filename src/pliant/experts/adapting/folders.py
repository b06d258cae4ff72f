"""Experts in folders: several on one base, and a mixture of them as an expert of its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn

from pliant.adapters.files import check_new, new_folder
from pliant.errors import AdapterError, InvalidInput, WrongBase
from pliant.experts.adapting.prompts import experts_on
from pliant.experts.config import SVFConfig
from pliant.experts.model import svf_layers
from pliant.experts.rows import Mixture, Rows

CONFIG = "adapter_config.json"
MIXED = "pliant_mixture"


def expert_folders(sources: Sequence[str | Path]) -> dict[str, Path]:
    """Name -> folder of each expert; a source is one, or a folder of several."""
    folders: dict[str, Path] = {}
    for source in map(Path, sources):
        own = list(_inside(source.expanduser()))
        if not own:
            raise InvalidInput(f"{source}: no expert here (looked for {CONFIG} in it and below)")
        for folder in own:
            name = folder.resolve().name
            if name in folders and folders[name].resolve() != folder.resolve():
                raise InvalidInput(f"{folders[name]} and {folder}: two experts of one name")
            folders[name] = folder
    if not folders:
        raise InvalidInput("there are no experts: name their folders")
    return folders


def _inside(source: Path) -> Iterator[Path]:
    if (source / CONFIG).is_file():
        yield source
    elif source.is_dir():
        yield from sorted(path.parent for path in source.glob(f"*/{CONFIG}"))


def load_experts(base: nn.Module, sources: Sequence[str | Path]) -> PeftModel:
    """The base with the experts of these folders on it, in eval mode; none changes it by itself.

    Experts of another base are refused, before any is put on this one.
    """
    folders = expert_folders(sources)
    for name, folder in folders.items():
        if "." in name or name == "base":
            raise InvalidInput(f"{folder}: no expert is named so; rename it (no dots, not base)")
        if not isinstance(_config(folder), SVFConfig):
            raise InvalidInput(f"{folder}: not an expert of singular values")
    model: PeftModel | None = None
    for name, folder in folders.items():
        try:
            with warnings.catch_warnings():  # of what PEFT asks transformers
                warnings.simplefilter("ignore", FutureWarning)
                if model is None:
                    model = PeftModel.from_pretrained(base, folder, adapter_name=name)
                else:
                    model.load_adapter(str(folder), adapter_name=name)
        except WrongBase as error:
            if model is not None:
                model.unload()
            raise WrongBase(f"{folder}: {error}") from error
    assert model is not None
    return model.requires_grad_(False).eval()


def base_of(folders: Mapping[str, Path]) -> str:
    """The name of the base that these experts name; all must name the same one."""
    names: dict[str, str] = {}
    for place in folders.values():
        config = _config(place)
        own = (getattr(config, "fingerprint", None) or {}).get("name")
        name = own or config.base_model_name_or_path
        if not name:
            raise InvalidInput(f"{place}: does not name its base; name it by hand")
        names.setdefault(name, str(place))
    if len(names) > 1:
        (first, folder), (second, other), *_ = names.items()
        raise WrongBase(
            f"{folder} is an expert of {first}, and {other} of {second}: experts of different "
            "bases cannot be mixed"
        )
    return next(iter(names))


def _config(folder: Path) -> Any:
    try:
        return PeftConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise AdapterError(f"{folder}: its {CONFIG} cannot be read ({error})") from error


def save_mixture(model: Any, mixture: Mixture, folder: str | Path) -> None:
    """Write a mixture of the experts on a PEFT model to a new folder, as one expert."""
    folder = Path(folder)
    check_new(folder)
    names = experts_on(model)
    weights = Rows.of_mixtures([mixture], names)
    if not mixture:
        raise InvalidInput("the mixture is the base itself: there is nothing to save")
    model.base_model.add_weighted_adapter(list(mixture), [0.0] * len(mixture), MIXED)
    try:
        with torch.no_grad():
            for _, layer in svf_layers(model):
                if MIXED in layer.svf_z:
                    target = layer.svf_z[MIXED].weight
                    own = weights.change(layer.changes(), target.shape, layer.layer_index)
                    target.copy_(own[0])
        with new_folder(folder) as unfinished:
            model.save_pretrained(unfinished, selected_adapters=[MIXED])
            for path in (unfinished / MIXED).iterdir():
                path.rename(unfinished / path.name)
            (unfinished / MIXED).rmdir()
            for card in unfinished.glob("README.md"):
                card.unlink()
    finally:
        model.delete_adapter(MIXED)
