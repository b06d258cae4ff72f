"""What benchmarks share that measure a real model: `--model smollm2-135m`.

The model is one of `pliant models get`; its prompts are this project's own documentation.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.loading import load, load_tokenizer

DOCUMENTS = Path(__file__).parents[1] / "docs"


def add_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a real model instead of a random one, by name or folder")
    parser.add_argument("--dtype", default="float32", help="of the real model")


def real_model(name: str, dtype: str = "float32") -> Any:
    """The model in eval mode and frozen."""
    return load(name, dtype=dtype)[0].requires_grad_(False)


@cache
def tokenizer(name: str) -> Any:
    return load_tokenizer(name)


@cache
def documents(name: str) -> Tensor:
    """(N,) the documentation in the model's own tokens."""
    pages = sorted(DOCUMENTS.glob("*.md"))
    return torch.tensor(tokenizer(name)("\n\n".join(p.read_text() for p in pages)).input_ids)


def prompts(name: str, count: int, length: int) -> Tensor:
    """(count, length) consecutive pieces of the documentation; from the start again at its end."""
    ids = documents(name)
    wanted = count * length
    return ids.repeat(wanted // len(ids) + 1)[:wanted].view(count, length)


def result_name(benchmark: str, model: str | None) -> str:
    """`score_generate`, or `score_generate_smollm2-135m`."""
    return f"{benchmark}_{Path(model).name}" if model else benchmark


def described(model: str | None, config: Any, dtype: str) -> Any:
    """The model, for a result's file."""
    return {"name": Path(model).name, "dtype": dtype} if model else config.to_diff_dict()


def command(benchmark: str, model: str | None) -> str:
    """What to type to measure it again."""
    return f"python -m benchmarks.{benchmark}" + (f" --model {Path(model).name}" if model else "")
