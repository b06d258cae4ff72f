"""What holds for every test: one thread, no network, no progress bars, the same seed."""

from __future__ import annotations

import os

# Before torch, tokenizers or the hub are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]

# Example times vary with the machine; a slow machine is not a wrong result.
settings.register_profile("pliant", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("pliant")


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the project."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def _own_bases(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Singular vectors are kept beside the tests, not in the user's cache."""
    os.environ["PLIANT_BASES"] = str(tmp_path_factory.mktemp("bases"))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test starts from the same random state, whichever ran before it on this worker."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
    yield
