"""`python -m pliant.nano.train`."""

from __future__ import annotations

from collections.abc import Sequence

from safetensors import SafetensorError

from pliant.cli import terminal
from pliant.cli.app import run_program
from pliant.errors import PliantError
from pliant.nano.train import TrainOptions, train


def main(arguments: Sequence[str] | None = None) -> None:
    def command(options: TrainOptions) -> None:
        """Train nano-s, then grow nano-l from it.

        After a stop, the same command goes on. Then measure the models with python -m
        pliant.nano.evaluate --write.

        Example: python -m pliant.nano.train --out weights --work runs/nano --threads 2
        """
        terminal.hide_loading_bars()
        try:
            train(options, terminal.progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on from the last checkpoint") from None
        except SafetensorError as error:  # of a full disk, too
            raise PliantError(str(error)) from error

    run_program(command, "python -m pliant.nano.train", arguments)


if __name__ == "__main__":
    main()
