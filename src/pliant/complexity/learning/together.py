"""Several processes that train one scorer: whether they shard, and what the first of them says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from transformers import Trainer


@contextmanager
def sharded_as_asked(trainer: Trainer) -> Iterator[None]:
    """Around the making of the trainer's accelerator, which decides whether anything is sharded.

    accelerate shards on GPUs and their like alone. Elsewhere it fails for want of a device, or
    leaves FSDP out and says nothing.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    asked = bool(trainer.args.fsdp) or launched
    try:
        yield
    except RuntimeError as error:
        if not asked:
            raise
        raise InvalidInput(f"FSDP was asked for, and accelerate cannot: {error}") from error
    if asked and not trainer.is_fsdp_enabled:
        kind = trainer.accelerator.distributed_type.value
        raise InvalidInput(
            f"FSDP was asked for, and accelerate does not shard here (it runs as {kind} on "
            f"{trainer.args.device.type}): leave it out, and each process holds the whole base "
            "while they train together; or train in several processes on GPUs"
        )
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise InvalidInput(
            "FSDP version 1 flattens the weights into shards that no scorer can be saved from: "
            'take version 2 (accelerate launch --fsdp_version 2, or fsdp_config={"version": 2})'
        )


def as_the_first(*values: Any) -> list[Any]:
    """The first process's values, in every one of them."""
    from accelerate.utils import broadcast_object_list

    return list(broadcast_object_list(list(values)))
