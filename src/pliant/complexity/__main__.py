"""`pliant train scorer` under the seeds' name, with the seeds' flags (underscores).

python -m pliant.complexity --model_name nano-s --data labels.jsonl --num_epochs 4
accelerate launch -m pliant.complexity ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pliant.cli.app import outcome, plain_flags
from pliant.cli.train import scorer


def main(arguments: Sequence[str] | None = None) -> int:
    flags = sys.argv[1:] if arguments is None else arguments
    return outcome(["train", "scorer", *plain_flags(scorer, flags)])


if __name__ == "__main__":
    sys.exit(main())
