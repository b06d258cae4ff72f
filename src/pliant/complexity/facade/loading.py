"""What `CPXCausalLM.from_pretrained` is told: a base or a saved scorer, and does all of it fit?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pliant import loading
from pliant.adapters import files
from pliant.complexity.config import CPXConfig
from pliant.complexity.facade.tokenizer import CPXTokenizer
from pliant.errors import InvalidInput, PliantError


def base_of(folder: str | Path) -> str:
    """The name of the base that a saved scorer belongs to."""
    if (Path(folder) / "config.json").is_file():
        return str(folder)
    base = files.read(Path(folder)).index.base
    if not base.name:
        raise InvalidInput(
            f"{folder}: its base, a {base.model}, was loaded from a folder, and its name is not "
            "kept: say where the base is now (base=...)"
        )
    return base.name


def saved_scorer(name: str | Path) -> Path | None:
    """The folder of a saved scorer, if the name leads to one; told apart by its files."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder if (folder / files.INDEX).is_file() else None
    if loading.resolve(name).kind == "hub" and _on_hub(str(name)):
        return files.locate(name)
    return None


def _on_hub(name: str) -> bool:
    """Whether a hub repository holds an adapter: as far as the cache or the hub can tell."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, files.INDEX), str):
        return True
    try:
        get_hf_file_metadata(hf_hub_url(name, files.INDEX))
    except Exception:  # not there, or no network: the base's own loading says which
        return False
    return True


def tokenizer_of(where: str | Path, options: dict[str, Any]) -> CPXTokenizer | None:
    """The base's, with [CPX]; None where it has none that would do: ids can still be scored."""
    passed = {k: v for k, v in options.items() if k in ("revision", "trust_remote_code")}
    try:
        return CPXTokenizer.from_pretrained(where, **passed)
    except PliantError:
        return None


def config_of(config: CPXConfig | None, num_labels: int | None) -> CPXConfig:
    if config is None:
        return CPXConfig(num_labels=num_labels)
    if num_labels not in (None, config.num_labels):
        raise InvalidInput(f"num_labels={num_labels}, and the config has {config.num_labels}")
    return config


def check_same(
    saved: CPXConfig, config: CPXConfig | None, num_labels: int | None, folder: Path
) -> None:
    if num_labels not in (None, saved.num_labels) or config not in (None, saved):
        raise InvalidInput(
            f"{folder} holds a scorer with {saved.num_labels} outputs and settings of its own "
            "(pliant.json): leave num_labels and config out"
        )


def check_id(cpx_token_id: Any, tokenizer_size: int | None) -> None:
    advice = "make the tokenizer with CPXTokenizer.from_pretrained, and take both from it"
    if cpx_token_id is None:
        return
    if not isinstance(cpx_token_id, int) or isinstance(cpx_token_id, bool) or cpx_token_id < 0:
        raise InvalidInput(f"cpx_token_id={cpx_token_id!r} is no token's id: {advice}")
    if tokenizer_size is not None and cpx_token_id != tokenizer_size - 1:
        raise InvalidInput(
            f"cpx_token_id={cpx_token_id} is not the last id of tokenizer_size={tokenizer_size}, "
            f"as [CPX]'s is: {advice}"
        )


def check_known(cpx_token_id: int | None, tokenizer: CPXTokenizer | None) -> None:
    if None in (cpx_token_id, tokenizer):
        return
    assert tokenizer is not None and cpx_token_id is not None
    if cpx_token_id < tokenizer.cpx_token_id:
        raise InvalidInput(
            f"cpx_token_id={cpx_token_id} is {tokenizer.convert_ids_to_tokens(cpx_token_id)!r} in "
            f"the base's vocabulary; [CPX] is {tokenizer.cpx_token_id}: make the tokenizer with "
            "CPXTokenizer.from_pretrained"
        )
