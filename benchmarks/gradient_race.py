"""Which way to train reaches a validation loss first, each with the same processor time?

    python -m benchmarks.gradient_race --regime scratch     # or another of REGIMES
        [--seconds 4] [--seeds 3] [--data FOLDER] [--quick] [--model smollm2-135m]

It runs `pliant.gradients.audit.race`: every contender starts from the same weights and reads the
same rows in the same order, and the measured time of a step decides how many steps the budget buys.
Two settings differ from the audit's. A step is timed in process time. And the learning rate rises
and then stays, while a running average of the weights is evaluated, so that a point of a curve does
not depend on where the curve ends. The rate is chosen from one grid, in shorter races with a seed
of their own: for standard training (the controls use it too) and for the first of our contenders
(our others use it too), or, with `--tune all`, for each. `speedup` compares two curves. FOLDER
holds `gsm8k-train.jsonl.gz` and `gsm8k-test.jsonl.gz`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import gradient_material as material
from benchmarks import real_model
from benchmarks.gradient_ways import (
    REGIMES,
    Regime,
    contenders_for,
    dense_contenders,
    dynamic_contenders,
    is_ours,
    real_regimes,
)
from benchmarks.harness import keep
from pliant.gradients.audit import race
from pliant.gradients.audit.contenders import STANDARD, Contender
from pliant.gradients.audit.result import Race, t_band
from pliant.stats import Band

Curve = list[tuple[float, float]]
"""(seconds, loss on the held-out rows)"""

TURNS, POINTS = 7, 8
"""Of the timing; of a curve."""
PILOT, PILOT_SEED = 0.5, 1000
"""The share of the budget that a race for a learning rate gets."""


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    regimes = real_regimes(options.model) if options.model else REGIMES
    if options.regime not in regimes:
        sys.exit(f"{options.model} has the regimes {', '.join(regimes)}")
    regime = regimes[options.regime]
    regime = replace(regime, rates=tuple(options.rates or regime.rates))
    figures = measured(regime, regime.rows(options), options)
    show(options.regime, figures)
    name = "gradient_race_" + options.regime.replace(" ", "_")
    name += "_dense" * options.dense + "_dynamic" * options.dynamic + "_only" * bool(options.only)
    name = real_model.result_name(name, options.model)
    keep(name, figures, " ".join(["python -m benchmarks.gradient_race", *command_line()]))


def measured(
    regime: Regime, rows: material.Material, options: argparse.Namespace
) -> dict[str, Any]:
    if options.dense or options.dynamic:
        contenders = dense_contenders() if options.dense else dynamic_contenders()
    else:
        contenders = contenders_for(regime, rows)
    if options.only:
        contenders = [c for c in contenders if c == STANDARD or c.name in options.only]
    rates = chosen_rates(regime, rows, contenders, options)
    races = [
        raced(regime, rows, contenders, rates, options.seconds, seed)
        for seed in track(range(options.seeds), "racing")
    ]
    lengths = [len(row["input_ids"]) for row in rows.train]
    learned = [sum(x != material.IGNORED for x in row["labels"]) for row in rows.train]
    return {
        "seconds": options.seconds,
        "seeds": options.seeds,
        "rates": list(regime.rates),
        "tuned": options.tune,
        "rows a step": regime.size,
        "tokens a row": float(np.mean(lengths)),
        "learned a row": float(np.mean(learned)),
        "ways": {c.name: figures_of(c, contenders, races, rates[c]) for c in contenders},
    }


def raced(
    regime: Regime,
    rows: material.Material,
    contenders: Sequence[Contender],
    rates: float | Mapping[Contender, float],
    seconds: float,
    seed: int,
    points: int = POINTS,
) -> Race:
    """The shipped race for one seed, which also decides the initial weights."""
    return race(
        regime.begin(seed),
        rows.train,
        rows.held[: regime.held],
        seconds=seconds,
        seeds=(seed,),
        batch_size=regime.size,
        lr=rates,
        average_weights=True,
        clock=time.process_time,
        points=points,
        turns=TURNS,
        contenders=contenders,
    )


def chosen_rates(
    regime: Regime,
    rows: material.Material,
    contenders: Sequence[Contender],
    options: argparse.Namespace,
) -> dict[Contender, float]:
    """The best of the grid in a shorter race: for each contender; or for standard training and our
    first contender, whose rates the controls and our others use."""
    first = next(c for c in contenders if is_ours(c))
    tuned = contenders if options.tune == "all" else [STANDARD, first]
    losses: dict[Contender, list[float]] = {c: [] for c in tuned}
    for rate in track(regime.rates, "choosing rates"):
        pilot = raced(regime, rows, tuned, rate, PILOT * options.seconds, PILOT_SEED, points=1)
        for run in pilot.runs:
            loss = pilot.loss(run)
            losses[run.contender].append(loss if math.isfinite(loss) else math.inf)
    best = {c: regime.rates[int(np.argmin(losses[c]))] for c in tuned}
    return {c: best.get(c, best[first if is_ours(c) else STANDARD]) for c in contenders}


def figures_of(
    contender: Contender, contenders: Sequence[Contender], races: Sequence[Race], rate: float
) -> dict[str, Any]:
    """One contender's figures; ours beside each control."""
    curves = {c: curves_of(c, races) for c in contenders}
    ends = np.array([curve[-1][1] for curve in curves[contender]])
    gains = np.array([curve[-1][1] for curve in curves[STANDARD]]) - ends
    runs = [one_race[contender.name] for one_race in races]
    figures = {
        "milliseconds a step": 1000 * float(np.mean([run.seconds_a_step for run in runs])),
        "steps": round(float(np.mean([run.steps for run in runs]))),
        "rate": rate,
        "loss": t_band(ends, 0.95).as_dict(),
        "below standard": t_band(gains, 0.95).as_dict(),
        "times as fast as standard": speedup(curves[contender], curves[STANDARD]).as_dict(),
        "curves": curves[contender],
    }
    if is_ours(contender):
        beside = {c: speedup(curves[contender], curves[c]) for c in contenders if c != contender}
        nearest = min((c for c in beside if not is_ours(c)), key=lambda c: beside[c].value)
        figures["times as fast as"] = {c.name: band.as_dict() for c, band in beside.items()}
        figures["least"] = nearest.name
    return figures


def curves_of(contender: Contender, races: Sequence[Race]) -> list[Curve]:
    """In seconds, for each seed."""
    runs = [one_race[contender.name] for one_race in races]
    return [
        [(share * run.steps * run.seconds_a_step, loss) for share, loss in curve]
        for run in runs
        for curve in run.curves
    ]


# --- how to compare two curves -------------------------------------------------------------------


def speedup(ours: Sequence[Curve], theirs: Sequence[Curve]) -> Band:
    """How many times as fast, with a band over seeds."""
    logs = np.array([math.log(times_as_fast(a, b)) for a, b in zip(ours, theirs, strict=True)])
    band = t_band(logs, 0.95)
    return Band(math.exp(band.value), math.exp(band.low), math.exp(band.high), band.level)


def times_as_fast(ours: Curve, theirs: Curve) -> float:
    """Two times are compared: when the curve with the lower end reaches the other's final loss for
    good, and how long the other one trained. A curve is exactly as fast as itself, and one is as
    many times faster than another as that one is slower."""
    ends = [end if math.isfinite(end) else math.inf for end in (ours[-1][1], theirs[-1][1])]
    times = [ours[-1][0], theirs[-1][0]]
    if ends[0] < ends[1]:
        times[0] = settled(ours, ends[1])
    elif ends[1] < ends[0]:
        times[1] = settled(theirs, ends[0])
    return times[1] / times[0]


def settled(curve: Curve, loss: float) -> float:
    """The time from which the curve stays at or below a loss, interpolated between its points. A
    dip that does not last does not count. At least a thousandth of the curve's time, for one that
    begins there."""
    end, last = curve[-1]
    if not last <= loss:
        raise ValueError(f"a curve that ends with {last} does not stay at or below {loss}")
    above = [i for i, (_, value) in enumerate(curve) if value > loss]
    if not above:
        return end / 1000
    (t0, a), (t1, b) = curve[above[-1] : above[-1] + 2]
    return max(end / 1000, t0 + (t1 - t0) * (a - loss) / (a - b))


# --- what is printed -----------------------------------------------------------------------------


def show(name: str, figures: dict[str, Any]) -> None:
    title = f"{name}: {figures['seconds']:g} s of process time each, {figures['seeds']} seeds"
    table = Table(title=title)
    for column in ("", "ms a step", "rate", "loss", "below standard", "times as fast as standard"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for way, values in figures["ways"].items():
        table.add_row(
            way,
            f"{values['milliseconds a step']:.0f}",
            f"{values['rate']:g}",
            f"{values['loss']['value']:.4f}",
            _band(values["below standard"]),
            _band(values["times as fast as standard"]),
        )
    console = Console(width=130)
    console.print(table)
    for way, values in figures["ways"].items():
        if "least" in values:
            band = _band(values["times as fast as"][values["least"]])
            console.print(
                f"{way}: at least {band} times as fast as any control ({values['least']})"
            )


def _band(band: Mapping[str, Any]) -> str:
    if band["low"] is None:
        return f"{band['value']:.3f}"
    return f"{band['value']:.3f} [{band['low']:.3f}, {band['high']:.3f}]"


def command_line() -> list[str]:
    """The options of this run, without where this machine keeps its data."""
    words = [f'"{word}"' if " " in word else word for word in sys.argv[1:]]
    return ["FOLDER" if last == "--data" else word for last, word in zip(["", *words], words)]  # noqa: B905


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--regime", choices=list(REGIMES), default="scratch")
    parser.add_argument("--seconds", type=float, default=4.0, help="of training, for each and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="race only these, by name, and standard training")
    parser.add_argument("--dense", action="store_true", help="race the default with dense steps")
    parser.add_argument("--dynamic", action="store_true", help="race a dynamic ratio")
    parser.add_argument("--rates", type=float, nargs="+", help="another grid of learning rates")
    parser.add_argument("--tune", choices=("two", "all"), default="two", help="whose rates")
    parser.add_argument("--data", type=Path, help="a folder with gsm8k-train.jsonl.gz")
    parser.add_argument("--model", help="fine-tune a real model instead, by name or folder")
    parser.add_argument("--quick", action="store_true", help="one seed, one second")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.seeds = 1.0, 1
    return options


if __name__ == "__main__":
    main()
