"""Where a saved scorer is, and which base it belongs to."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from pliant import loading
from pliant.adapters import files
from pliant.adapters.local_bases import noted_place
from pliant.errors import InvalidInput


def base_of(folder: str | Path) -> str:
    """The name of the base that a saved scorer belongs to, or its folder on this machine."""
    if (Path(folder) / "config.json").is_file():
        return str(folder)
    base = files.read(Path(folder)).index.base
    place = base.name or noted_place(asdict(base))
    if not place:
        raise InvalidInput(
            f"{folder}: its base, a {base.model}, was loaded from a folder that is unknown on this "
            "machine, or has moved: name the base's folder (base=..., or --base)"
        )
    return place


def saved_scorer(name: str | Path) -> Path | None:
    """The folder of a saved scorer, if there is one at that path or hub name."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder if (folder / files.INDEX).is_file() else None
    if loading.resolve(name).kind == "hub" and _on_hub(str(name)):
        return files.locate(name)
    return None


def _on_hub(name: str) -> bool:
    """Whether a hub repository holds an adapter, according to the cache or the hub."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, files.INDEX), str):
        return True
    try:
        get_hf_file_metadata(hf_hub_url(name, files.INDEX))
    except Exception:  # missing, or no network: loading the base reports which
        return False
    return True
