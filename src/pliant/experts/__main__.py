"""The seed's example, from the command line: an expert for a mocked maths domain.

python -m pliant.experts --model_name nano-l --output_dir outputs --logging_dir logs \
    --batch_size 4 --max_epochs 1 --learning_rate 0.01
"""

from __future__ import annotations

from collections.abc import Sequence

from pliant.cli.app import run_program
from pliant.cli.expert.example import example


def main(arguments: Sequence[str] | None = None) -> None:
    run_program(example, "python -m pliant.experts", arguments)


if __name__ == "__main__":
    main()
