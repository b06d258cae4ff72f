"""Experts in folders: several on one base, and a mixture of them as an expert of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from pliant.errors import InvalidInput, PliantError, WrongBase
from pliant.experts.adapting.prompts import experts_on
from pliant.experts.expert import Expert
from pliant.experts.folder import CONFIG, base_place_of, read_settings
from pliant.experts.model import check_name, svf_layers
from pliant.experts.rows import Mixture, Rows
from pliant.files import check_new, new_folder

MIXED = "pliant_mixture"


def expert_folders(sources: Sequence[str | Path]) -> dict[str, Path]:
    """Name -> folder of each expert; a source is one, or a folder of several."""
    folders: dict[str, Path] = {}
    for source in map(Path, sources):
        inside = list(_inside(source.expanduser()))
        if not inside:
            raise InvalidInput(f"{source}: no expert here (looked for {CONFIG} in it and below)")
        for folder in inside:
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
    """The base with the experts of these folders, frozen and in eval mode; the first is active.

    All files are read before the base is touched. If one expert does not fit the base, every
    expert comes off again.
    """
    experts: dict[Path, tuple[str, Expert]] = {}
    for name, folder in expert_folders(sources).items():
        if name == "base":
            raise InvalidInput(f"{folder}: `base` stands for no expert: rename the folder")
        check_name(name)
        experts[folder] = name, Expert.load(folder)
    model = base
    for folder, (name, expert) in experts.items():
        try:
            model = expert.apply(model, name)
        except PliantError as error:
            if isinstance(model, PeftModel):
                model.unload()
            raise type(error)(f"{folder}: {error}") from error
    return cast(PeftModel, model).requires_grad_(False).eval()


def base_of(folders: Mapping[str, Path]) -> str:
    """The name of the base that these experts name; all must name the same one."""
    names: dict[str, str] = {}
    for folder in folders.values():
        name = base_place_of(read_settings(folder))
        if not name:
            raise InvalidInput(f"{folder}: does not name its base: name it, --base NAME")
        names.setdefault(name, str(folder))
    if len(names) > 1:
        (base, expert), (second_base, second_expert), *_ = names.items()
        raise WrongBase(
            f"{expert} is an expert of {base}, and {second_expert} of {second_base}: experts of "
            "different bases cannot be mixed"
        )
    return next(iter(names))


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
