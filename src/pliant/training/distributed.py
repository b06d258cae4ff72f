"""Several processes that train together: sharding as requested, and values they must agree on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer

from pliant.errors import InvalidInput


@contextmanager
def check_sharding(trainer: Trainer) -> Iterator[None]:
    """Wraps `create_accelerator_and_postprocess`, which decides whether anything is sharded.

    accelerate shards on GPUs and similar devices only. On a CPU it raises, or silently leaves FSDP
    out.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    requested = bool(trainer.args.fsdp) or launched
    try:
        yield
    except RuntimeError as error:
        if not requested:
            raise
        raise InvalidInput(f"FSDP was asked for, and accelerate cannot: {error}") from error
    if requested and not trainer.is_fsdp_enabled:
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


def from_first_process(*values: Any) -> list[Any]:
    """The first process's values, in every process."""
    from accelerate.utils import broadcast_object_list

    return list(broadcast_object_list(list(values)))
