"""Who reaches a validation loss first, each given the same processor time?

    python -m benchmarks.gradient_race --regime scratch     # or another of REGIMES
        [--seconds 4] [--seeds 3] [--data FOLDER] [--quick]

A step of each is timed first, turn by turn in one process (process time, one thread, the optimizer
among it); the time then buys each so many steps. Each starts from the same weights and reads the
same rows in the same order, with AdamW at a rate that rises and then stays, so that a point of a
curve does not depend on where the curve ends; what is examined is a running average of the weights,
for the same reason. That rate is chosen from one grid, in shorter runs on
a seed of their own: for standard training (the controls take it too) and for the first of ours (the
others of ours take it too), or, by `--tune all`, for each. How many times as fast one is than
another: the time in which it reaches what the other ends with; or, if it never does, the share of
its time in which the other had reached what it ends with. FOLDER holds `gsm8k-train.jsonl.gz` and
`gsm8k-test.jsonl.gz`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import stats
from torch import nn

from benchmarks import gradient_material as material
from benchmarks.gradient_ways import REGIMES, Batch, Regime, Step, Way, ways_for
from benchmarks.harness import keep
from pliant.gradients.audit.contenders import narrowed
from pliant.gradients.audit.rows import padded
from pliant.stats import Band

Curve = list[tuple[float, float]]
"""(seconds, loss on the held-out rows)"""

TURNS, POINTS, PILOT, PILOTS = 5, 8, 0.5, 1000
"""Of the pace; of a curve; a pilot's share of the time, and its seed."""
LATE = 8
"""What is examined is an average over the last ninth of the steps, about."""


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    regime = REGIMES[options.regime]
    rows = regime.rows(options)
    figures = raced(regime, rows, options)
    shown(options.regime, figures)
    name = "gradient_race_" + options.regime.replace(" ", "_") + "_only" * bool(options.only)
    keep(name, figures, " ".join(["python -m benchmarks.gradient_race", *_given()]))


def raced(regime: Regime, rows: material.Material, options: argparse.Namespace) -> dict[str, Any]:
    ways = [way for way in ways_for(regime, rows) if not options.only or way.name in options.only]
    pace = paces(regime, rows, ways)
    exam = [padded(list(rows.held[at : at + 16])) for at in range(0, regime.held, 16)]
    run = partial(lap, regime, rows, exam)
    rates = chosen_rates(regime, ways, pace, options, run)
    curves: dict[Way, list[Curve]] = {way: [] for way in ways}
    laps = [(seed, way) for seed in range(options.seeds) for way in ways]
    for seed, way in track(laps, "racing"):
        budget = max(1, int(options.seconds / pace[way]))
        curves[way].append(run(way, rates[way], seed, budget, pace[way]))
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
        "ways": {way.name: told(way, ways, curves, pace[way], rates[way]) for way in ways},
    }


def chosen_rates(
    regime: Regime,
    ways: list[Way],
    pace: dict[Way, float],
    options: argparse.Namespace,
    run: Callable[..., Curve],
) -> dict[Way, float]:
    """The best of the grid in a shorter run: for each; or for standard training and for the first
    of ours, whose rates then are those of the controls and of ours."""

    def end(way: Way, rate: float) -> float:
        budget = max(1, int(PILOT * options.seconds / pace[way]))
        loss = run(way, rate, PILOTS, budget, pace[way], points=1)[-1][1]
        return loss if math.isfinite(loss) else math.inf

    first = next(way for way in ways if way.ours)
    asked = ways if options.tune == "all" else [ways[0], first]
    best = {}
    for way in track(asked, "choosing rates"):
        best[way] = min(regime.rates, key=partial(end, way))
    return {way: best.get(way, best[first if way.ours else ways[0]]) for way in ways}


def told(
    way: Way, ways: list[Way], curves: dict[Way, list[Curve]], pace: float, rate: float
) -> dict[str, Any]:
    """One way's figures; ours beside each control."""
    standard = next(one for one in ways if one.name == "standard")
    ends = np.array([curve[-1][1] for curve in curves[way]])
    apart = np.array([curve[-1][1] for curve in curves[standard]]) - ends
    found = {
        "milliseconds a step": 1000 * pace,
        "steps": int(round(curves[way][0][-1][0] / pace)),
        "rate": rate,
        "loss": t_band(ends).as_dict(),
        "below standard": t_band(apart).as_dict(),
        "times as fast as standard": faster(curves[way], curves[standard]).as_dict(),
        "curves": curves[way],
    }
    if way.ours:
        rivals = {one.name: faster(curves[way], curves[one]) for one in ways if not one.ours}
        found["times as fast as"] = {name: band.as_dict() for name, band in rivals.items()}
        found["least"] = min(rivals, key=lambda name: rivals[name].value)
    return found


# --- how -----------------------------------------------------------------------------------------


def paces(regime: Regime, rows: material.Material, ways: list[Way]) -> dict[Way, float]:
    """Seconds of a whole training step, turn by turn."""
    taken: dict[Way, list[float]] = {way: [] for way in ways}
    begin = regime.begin(0)
    for turn, batch in zip(range(TURNS + 1), rows.batches(regime.size, 7)):  # noqa: B905
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            model = material.copied(begin)
            optimizer = _optimizer(model, regime.rates[0])
            with way.on(model) as step:
                _stepped(model, step, batch, 0, optimizer)  # finds out what it needs to know
                begun = time.process_time()
                _stepped(model, step, batch, 1, optimizer)
                if turn:
                    taken[way].append(time.process_time() - begun)
    return {way: median(seconds) for way, seconds in taken.items()}


def lap(
    regime: Regime,
    rows: material.Material,
    exam: Sequence[Batch],
    way: Way,
    rate: float,
    seed: int,
    steps: int,
    pace: float,
    points: int = POINTS,
) -> Curve:
    """One training, looked at on the way."""
    torch.manual_seed(seed)
    model = material.copied(regime.begin(seed))
    optimizer = _optimizer(model, rate)
    stops = {max(1, round(steps * (i + 1) / points)) for i in range(points)}
    average = [p.detach().clone() for p in model.parameters()]
    curve = [(0.0, examined(model, exam))]
    with way.on(model) as step:
        for done, batch in zip(range(1, steps + 1), rows.batches(regime.size, seed)):  # noqa: B905
            optimizer.param_groups[0]["lr"] = rate * min(1.0, done / max(1.0, 0.05 * steps))
            _stepped(model, step, batch, seed * 1_000_003 + done, optimizer)
            for mean, p in zip(average, model.parameters(), strict=True):
                mean.lerp_(p.detach(), (LATE + 1) / (done + LATE))
            if done in stops:
                with instead(model, average):
                    curve.append((done * pace, examined(model, exam)))
    return curve


@contextmanager
def instead(model: Any, values: list[torch.Tensor]) -> Iterator[None]:
    """These in place of the model's weights, for as long as this lasts."""
    for p, value in zip(model.parameters(), values, strict=True):
        p.data, value.data = value.data, p.data
    try:
        yield
    finally:
        for p, value in zip(model.parameters(), values, strict=True):
            p.data, value.data = value.data, p.data


def _stepped(model: Any, step: Step, batch: Batch, draw: int, optimizer: Any) -> None:
    optimizer.zero_grad(set_to_none=True)
    step(batch, draw)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _optimizer(model: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)


@torch.no_grad()
def examined(model: Any, exam: Sequence[Batch]) -> float:
    """The mean loss of all held-out tokens."""
    model.eval()
    total, count = 0.0, 0
    for batch in exam:
        learned = int((batch["labels"][:, 1:] != material.IGNORED).sum())
        total += float(model(**narrowed(dict(batch))).loss) * learned
        count += learned
    model.train()
    return total / count


def faster(ours: list[Curve], theirs: list[Curve]) -> Band:
    """How many times as fast, with a band over seeds."""
    logs = np.array([math.log(_faster(a, b)) for a, b in zip(ours, theirs, strict=True)])
    band = t_band(logs)
    return Band(math.exp(band.value), math.exp(band.low), math.exp(band.high), band.level)


def _faster(ours: Curve, theirs: Curve) -> float:
    end, reached = theirs[-1][0], _first(ours, theirs[-1][1])
    if reached is not None:
        return end / max(reached, 1e-9)
    before = _first(theirs, ours[-1][1])
    return max(1e-3, before or 0.0) / ours[-1][0]


def _first(curve: Curve, loss: float) -> float | None:
    """When it first was that low, straight lines between its points."""
    for (t0, a), (t1, b) in zip(curve, curve[1:], strict=False):
        if b <= loss:
            return t0 if a <= loss else t0 + (t1 - t0) * (a - loss) / (a - b)
    return None


def t_band(values: np.ndarray[Any, Any], level: float = 0.95) -> Band:
    n, mean = len(values), float(values.mean())
    if n < 2 or not np.isfinite(values).all():
        return Band(mean, math.nan, math.nan, level)
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return Band(mean, mean - half, mean + half, level)


# --- what is said --------------------------------------------------------------------------------


def shown(name: str, figures: dict[str, Any]) -> None:
    title = f"{name}: {figures['seconds']:g} s of process time each, {figures['seeds']} seeds"
    table = Table(title=title)
    for column in ("", "ms a step", "rate", "loss", "below standard", "times as fast as standard"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for way, one in figures["ways"].items():
        table.add_row(
            way,
            f"{one['milliseconds a step']:.0f}",
            f"{one['rate']:g}",
            f"{one['loss']['value']:.4f}",
            _band(one["below standard"]),
            _band(one["times as fast as standard"]),
        )
    console = Console(width=130)
    console.print(table)
    for way, one in figures["ways"].items():
        if "least" in one:
            band = _band(one["times as fast as"][one["least"]])
            console.print(f"{way}: at least {band} times as fast as any control ({one['least']})")


def _band(band: Mapping[str, Any]) -> str:
    if band["low"] is None:
        return f"{band['value']:.3f}"
    return f"{band['value']:.3f} [{band['low']:.3f}, {band['high']:.3f}]"


def _given() -> list[str]:
    """The options of this run, without where this machine keeps its data."""
    given = [f'"{one}"' if " " in one else one for one in sys.argv[1:]]
    return ["FOLDER" if before == "--data" else one for before, one in zip(["", *given], given)]  # noqa: B905


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--regime", choices=list(REGIMES), default="scratch")
    parser.add_argument("--seconds", type=float, default=4.0, help="that each may train, a seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="these ways alone, by name, standard among them")
    parser.add_argument("--tune", choices=("two", "all"), default="two", help="rates of whom")
    parser.add_argument("--data", type=Path, help="a folder with gsm8k-train.jsonl.gz")
    parser.add_argument("--quick", action="store_true", help="one seed, one second")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.seeds = 1.0, 1
    return options


if __name__ == "__main__":
    main()
