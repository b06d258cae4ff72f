"""Quality against cost of a router between the two embedded models, beside its controls.

    python -m benchmarks.quality_cost

The demo's router chapter on more questions: a [CPX] scorer and a scorer of the text alone, trained
on the same labels, chance and perfect routing. Unlike APGR this counts what scoring costs: nano-s
reads each prompt before nano-l may answer it. Costs are counted operations, the same on every
machine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from benchmarks.harness import keep
from pliant.cli.demo import router, two_models
from pliant.cli.demo.size import FULL
from pliant.reports.plots import Line

POINTS = 60
"""Of each curve, for the picture."""


def main(
    train: Annotated[int, typer.Option(help="Questions to learn from.")] = 6_000,
    calibrate: Annotated[int, typer.Option(help="Questions to choose the thresholds on.")] = 2_000,
    test: Annotated[int, typer.Option(help="Test questions.")] = 6_000,
    seed: Annotated[int, typer.Option(help="Of the test questions.")] = 0,
) -> None:
    """Print the routers and write the results."""
    measured = two_models.measure(test, seed)
    routed = router.measure(measured, replace(FULL, trained=train, calibrated=calibrate))
    figures = {
        "questions": test,
        "right": {name: measured.share(name) for name in two_models.NAMES},
        **{name: value for name, value in routed.as_dict().items() if name != "turns"},
        "lines": {name: thinned(line) for name, line in router.lines(measured, routed).items()},
    }
    print(router.section(measured, routed).sentences)
    keep("quality_cost", figures, "python -m benchmarks.quality_cost")


def thinned(line: Line) -> list[Any]:
    """Some of its points, evenly spread, with both ends."""
    points = list(zip(line.x, line.y, strict=True))
    every = max(1, len(points) // POINTS)
    sample = points[::every] + ([] if (len(points) - 1) % every == 0 else points[-1:])
    return [[round(x, 4), round(y, 4)] for x, y in sample]


if __name__ == "__main__":
    typer.run(main)
