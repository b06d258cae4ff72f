"""`python -m pliant.nano.evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

from pliant.cli import terminal
from pliant.cli.app import run_program
from pliant.nano.evaluate import EvaluateOptions, evaluate


def main(arguments: Sequence[str] | None = None) -> None:
    def command(options: EvaluateOptions) -> None:
        """Measure the accuracy of the embedded models by family and difficulty.

        Example: python -m pliant.nano.evaluate nano-s
        """
        terminal.hide_loading_bars()
        try:
            evaluate(options, terminal.progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("no card is half-written") from None

    run_program(command, "python -m pliant.nano.evaluate", arguments)


if __name__ == "__main__":
    main()
