"""Which weights of a model a recovery trains, in which dtype, and in memory of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pliant.adapters import attached
from pliant.errors import UnsupportedModel
from pliant.training.run import with_lora

Train = Literal["lora", "norms", "all"]
"""Low-rank matrices, the vectors of norms and biases, or every weight."""


@contextmanager
def trainable(model: Any, train: Train, rank: int, teacher: Any, seed: int) -> Iterator[Any]:
    """The model with the chosen weights trainable, in fp32, and in memory of their own; after the
    block they have their dtypes again, and the model its mode."""
    training, use_cache = model.training, getattr(model.config, "use_cache", None)
    required = {p: p.requires_grad for p in model.parameters()}
    dtypes: dict[nn.Parameter, torch.dtype] = {}
    try:
        if train == "lora":
            with _unloaded_on_error(with_lora(model, rank, seed)) as student:
                yield student
            return
        adapters = {p for adapter in attached(model).values() for p in adapter.parameters()}
        for parameter in required:
            chosen = train == "all" or parameter.dim() <= 1
            chosen = chosen and parameter not in adapters
            parameter.requires_grad_(chosen and parameter.is_floating_point())
        chosen_parameters = [p for p in model.parameters() if p.requires_grad]
        if not chosen_parameters:
            raise UnsupportedModel(
                f"{type(model).__name__} has no vectors of norms or biases: train lora, or all"
            )
        take_own_memory(chosen_parameters, teacher)
        for parameter in chosen_parameters:
            dtypes[parameter] = parameter.dtype
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        yield model
    finally:
        model.train(training)
        if use_cache is not None:
            model.config.use_cache = use_cache  # gradient checkpointing turns it off
        for parameter, dtype in dtypes.items():
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
        for parameter, before in required.items():
            parameter.requires_grad_(before)


@contextmanager
def _unloaded_on_error(student: Any) -> Iterator[Any]:
    try:
        yield student
    except BaseException:
        student.unload()
        raise


def take_own_memory(parameters: Sequence[nn.Parameter], teacher: Any) -> None:
    """Copy those that share memory with the teacher, which would change with them."""
    theirs = {_memory(tensor) for tensor in (teacher.parameters() if teacher is not None else ())}
    for parameter in parameters:
        if _memory(parameter) in theirs:
            parameter.data = parameter.data.clone()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
