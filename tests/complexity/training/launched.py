"""Run by `accelerate launch`: asked to shard on CPUs, says how it is refused."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.complexity.training.test_trainer import scorer_on, trainer

from pliant.errors import InvalidInput

if __name__ == "__main__":
    for args in ({}, {"fsdp": True, "fsdp_config": {"version": 2}}):
        try:
            trainer(scorer_on(), Path(sys.argv[1]), args=args)
        except InvalidInput as error:
            print(f"refused: {error}")
