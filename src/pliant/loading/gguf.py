"""A GGUF file's weights as a dense model.

transformers unpacks every weight of a GGUF file when it loads it, but leaves the marks of a
quantised model on the result, which then can neither be saved nor trained. `as_dense` removes them.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pliant.errors import InvalidInput, ModelNotFound

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pliant.loading.names import Source

MAGIC = b"GGUF"
MARKS = ("hf_quantizer", "quantization_method", "quantization_config", "_is_quantized")


def as_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Remove the marks of a quantised model, in place, from a model whose weights are dense."""
    model.is_quantized = False
    for holder in (model, model.config):
        for mark in MARKS:
            vars(holder).pop(mark, None)
    return model


def check_readable(source: Source) -> None:
    """`InvalidInput` without the package that reads GGUF; `ModelNotFound` for another file."""
    if not source.gguf:
        return
    if find_spec("gguf") is None:
        raise InvalidInput(f"{source} is a GGUF file: reading it needs pip install 'pliant[gguf]'")
    path = Path(source.location) / source.gguf
    if source.kind == "hub":
        return
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ModelNotFound(f"{source} is no GGUF file (it does not begin with {MAGIC!r})")
