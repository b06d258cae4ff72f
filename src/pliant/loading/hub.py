"""Files of a repository on the hub: from the hub if it answers, else from its local cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pliant.errors import ModelNotFound
from pliant.loading.names import LORA_CONFIG, Source, suggestion

LORA_FILES = ("adapter_*", "*token*", "*vocab*", "*.model", "merges.txt", "*.jinja")


def fetch_config(source: Source, revision: str | None) -> Path:
    """The config.json of a model, or one line that says why there is none."""
    from huggingface_hub import errors as hub

    near, nowhere = suggestion(source.name), ": no such embedded model or local folder, and "
    gated = " is gated: accept its terms on the hub, then log in with `hf auth login`"
    unreachable = f"{nowhere}the hub is unreachable (offline?){near}"
    reasons: list[tuple[type[Exception], str]] = [
        (hub.GatedRepoError, gated),
        (hub.RepositoryNotFoundError, f"{nowhere}none on the hub (or it is private){near}"),
        (hub.RevisionNotFoundError, f" has no revision {revision!r} on the hub"),
        (hub.LocalEntryNotFoundError, unreachable),
        (hub.EntryNotFoundError, " is on the hub, but has no config.json"),
    ]
    try:
        offline = is_offline(source, "config.json", revision)
        return _download(source, "config.json", revision, offline)
    except (hub.HfHubHTTPError, hub.EntryNotFoundError, OSError) as error:
        reason = next((why for kind, why in reasons if isinstance(error, kind)), unreachable)
        raise ModelNotFound(f"{source}{reason}") from error


def with_lora(source: Source, revision: str | None = None) -> Source:
    """The same place, or the folder of its files if it is a repository of a LoRA alone."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    if source.kind != "hub" or source.gguf:
        return source
    if isinstance(try_to_load_from_cache(source.location, "config.json", revision=revision), str):
        return source  # a model, and nothing has to be asked
    offline = is_offline(source, "config.json", revision)
    if _has(source, "config.json", revision, offline):
        return source
    if not _has(source, LORA_CONFIG, revision, offline):
        return source
    how: Any = {"revision": revision, "allow_patterns": [*LORA_FILES], "local_files_only": offline}
    try:
        folder = snapshot_download(source.location, **how)
    except Exception as error:  # the client has dozens of kinds without a common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelNotFound(f"{source} is a LoRA that cannot be downloaded: {reason}") from error
    return replace(source, location=folder, kind="lora")


def hub_answers(ask: Callable[[], object]) -> bool:
    """Asks once: a download retries six times, for most of a minute, before it fails."""
    from huggingface_hub import errors

    try:
        ask()
    except errors.HfHubHTTPError:
        pass  # the hub answers: the download raises the specific error
    except Exception:  # the client's connection errors, and its offline mode
        return False
    return True


def _has(source: Source, file: str, revision: str | None, offline: bool) -> bool:
    """Whether the repository has this file, on the hub or, offline, in the cache."""
    from huggingface_hub import errors as hub

    try:
        return _download(source, file, revision, offline).is_file()
    except (hub.HfHubHTTPError, hub.EntryNotFoundError, OSError):
        return False


def is_offline(source: Source, file: str, revision: str | None = None) -> bool:
    """Whether the hub does not answer when it is asked for this file."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(source.location, file, revision=revision)
    return not hub_answers(lambda: get_hf_file_metadata(url))


def _download(source: Source, file: str, revision: str | None, offline: bool) -> Path:
    from huggingface_hub import hf_hub_download

    which: Any = {"repo_id": source.location, "filename": file, "revision": revision}
    return Path(hf_hub_download(**which, local_files_only=offline))
