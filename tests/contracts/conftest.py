"""Tiny random models of every architecture, built once a session, offered as parameters.

`quick` is a dozen families in fp32 and bf16, for laws that are dear or about to be written; `every`
is each type that runs, in fp32. Both give a Specimen: its `model`, `anatomy`, `ids` and `logits`.
A test leaves the model as it found it.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache

import pytest
import torch
from tests.contracts.page import PAGE

from pliant.anatomy.tiny import causal_lm_types, variants
from pliant.survey import Specimen

QUICK = (
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "falcon",
    "bloom",
    "opt",
    "mixtral",
    "mamba",
    "jamba",
    "qwen3_next",
    "gemma3n_text",
    "gemma4_text+shared_keys",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@cache
def specimen(name: str, dtype: torch.dtype = torch.float32) -> Specimen:
    own = Specimen(name, dtype)
    # Now, and not when something is attached to the model; some types do not run.
    with suppress(Exception):
        _ = own.logits
    return own


def runnable() -> list[str]:
    """The types and variants that the page says build and run."""
    return [name for name in [*causal_lm_types(), *variants()] if PAGE.says(name, "runs")]


@pytest.fixture(params=[f"{name}-{dtype}" for name in QUICK for dtype in DTYPES])
def quick(request: pytest.FixtureRequest) -> Specimen:
    name, dtype = request.param.rsplit("-", 1)
    if name not in (*causal_lm_types(), *variants()):
        pytest.skip("this transformers does not know the type")
    return specimen(name, DTYPES[dtype])


@pytest.fixture(params=runnable())
def every(request: pytest.FixtureRequest) -> Specimen:
    return specimen(request.param)
