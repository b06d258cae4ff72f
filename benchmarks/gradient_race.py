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
another: see `faster`. FOLDER holds `gsm8k-train.jsonl.gz` and `gsm8k-test.jsonl.gz`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from benchmarks.gradient_ways import (
    REGIMES,
    STANDARD,
    Batch,
    Regime,
    Step,
    Way,
    dense_ways,
    ways_for,
)
from benchmarks.harness import RESULTS, keep
from pliant.data.collate import Collator
from pliant.gradients.audit.contenders import narrowed
from pliant.stats import Band

Curve = list[tuple[float, float]]
"""(seconds, loss on the held-out rows)"""

TURNS, POINTS, PILOT, PILOTS = 7, 8, 0.5, 1000
"""Of the pace; of a curve; a pilot's share of the time, and its seed."""
LATE = 8
"""What is examined is an average over the last ninth of the steps, about."""


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    name = "gradient_race_" + options.regime.replace(" ", "_")
    name += "_dense" * options.dense + "_only" * bool(options.only)
    if options.again:
        shown(options.regime, retold(RESULTS / f"{name}.json"))
        return
    regime = REGIMES[options.regime]
    regime = replace(regime, rates=tuple(options.rates or regime.rates))
    figures = raced(regime, regime.rows(options), options)
    shown(options.regime, figures)
    keep(name, figures, " ".join(["python -m benchmarks.gradient_race", *_given()]))


def retold(path: Path) -> dict[str, Any]:
    """The figures of a race that was run before, told from its curves as they are told now."""
    record = json.loads(path.read_text(encoding="utf-8"))
    ways: dict[str, Any] = record["figures"]["ways"]
    ours = [name for name, one in ways.items() if "least" in one]
    for name, one in ways.items():
        beside = {other: faster(one["curves"], ways[other]["curves"]) for other in ways}
        one["times as fast as standard"] = beside["standard"].as_dict()
        if name in ours:
            del beside[name]
            one |= _beside(beside, ours)
    record["told"] = "anew, from the curves of this run"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return dict(record["figures"])


def raced(regime: Regime, rows: material.Material, options: argparse.Namespace) -> dict[str, Any]:
    ways = dense_ways() if options.dense else ways_for(regime, rows)
    ways = [way for way in ways if not options.only or way.name in options.only]
    pace = paces(regime, rows, ways)
    exam = [Collator()(list(rows.held[at : at + 16])) for at in range(0, regime.held, 16)]
    run = partial(lap, regime, rows, exam)
    rates = chosen_rates(regime, ways, pace, options, run)
    curves: dict[Way, list[Curve]] = {way: [] for way in ways}
    laps = [(seed, way) for seed in range(options.seeds) for way in ways]
    for seed, way in track(laps, "racing"):
        curves[way].append(run(way, rates[way], seed, costs(way, pace, options.seconds)))
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
        "ways": {way.name: told(way, ways, curves, pace, rates[way], options) for way in ways},
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
        bought = costs(way, pace, PILOT * options.seconds)
        loss = run(way, rate, PILOTS, bought, points=1)[-1][1]
        return loss if math.isfinite(loss) else math.inf

    first = next(way for way in ways if way.ours)
    asked = ways if options.tune == "all" else [STANDARD, first]
    best = {}
    for way in track(asked, "choosing rates"):
        best[way] = min(regime.rates, key=partial(end, way))
    return {way: best.get(way, best[first if way.ours else STANDARD]) for way in ways}


def told(
    way: Way,
    ways: list[Way],
    curves: dict[Way, list[Curve]],
    pace: dict[Way, float],
    rate: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One way's figures; ours beside each control."""
    bought = costs(way, pace, options.seconds)
    ends = np.array([curve[-1][1] for curve in curves[way]])
    apart = np.array([curve[-1][1] for curve in curves[STANDARD]]) - ends
    found = {
        "milliseconds a step": 1000 * sum(bought) / len(bought),
        "steps": len(bought),
        "rate": rate,
        "loss": t_band(ends).as_dict(),
        "below standard": t_band(apart).as_dict(),
        "times as fast as standard": faster(curves[way], curves[STANDARD]).as_dict(),
        "curves": curves[way],
    }
    if way.ours:
        beside = {one.name: faster(curves[way], curves[one]) for one in ways if one is not way}
        found |= _beside(beside, {one.name for one in ways if one.ours})
    return found


def _beside(bands: dict[str, Band], ours: Collection[str]) -> dict[str, Any]:
    """Beside each, and the control that is nearest."""
    controls = [name for name in bands if name not in ours]
    return {
        "times as fast as": {name: band.as_dict() for name, band in bands.items()},
        "least": min(controls, key=lambda name: bands[name].value),
    }


# --- how -----------------------------------------------------------------------------------------


def costs(way: Way, pace: Mapping[Way, float], seconds: float) -> list[float]:
    """What each step takes, for as many as this time buys: one at least."""
    found: list[float] = []
    for dense in way.dense_steps():
        cost = pace[STANDARD] if dense else pace[way]
        if found and sum(found) + cost > seconds:
            return found
        found.append(cost)
    return found


def paces(regime: Regime, rows: material.Material, ways: list[Way]) -> dict[Way, float]:
    """Seconds of a whole training step, turn by turn; with dense steps now and then, of the others:
    a dense one takes what standard training's take."""
    kinds = list(dict.fromkeys(way.steady for way in ways))
    seconds = _paces(regime, rows, kinds)
    return {way: seconds[way.steady] for way in ways}


def _paces(regime: Regime, rows: material.Material, ways: list[Way]) -> dict[Way, float]:
    select_rows: dict[Way, list[float]] = {way: [] for way in ways}
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
                    select_rows[way].append(time.process_time() - begun)
    return {way: median(seconds) for way, seconds in select_rows.items()}


def lap(
    regime: Regime,
    rows: material.Material,
    exam: Sequence[Batch],
    way: Way,
    rate: float,
    seed: int,
    costs: Sequence[float],
    points: int = POINTS,
) -> Curve:
    """One training of steps that take so long, looked at on the way."""
    torch.manual_seed(seed)
    model = material.copied(regime.begin(seed))
    optimizer = _optimizer(model, rate)
    steps, clock = len(costs), np.cumsum(costs)
    stops = {int(abs(clock - clock[-1] * (i + 1) / points).argmin()) + 1 for i in range(points)}
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
                    curve.append((float(clock[done - 1]), examined(model, exam)))
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
    logs = np.array([math.log(times_as_fast(a, b)) for a, b in zip(ours, theirs, strict=True)])
    band = t_band(logs)
    return Band(math.exp(band.value), math.exp(band.low), math.exp(band.high), band.level)


def times_as_fast(ours: Curve, theirs: Curve) -> float:
    """From when on does the one that ends lower stay at or below what the other ends with? That,
    and the whole time that the other had, are their times. A curve is exactly as fast as itself,
    and one is as many times faster than another as that one is slower."""
    ends = [end if math.isfinite(end) else math.inf for end in (ours[-1][1], theirs[-1][1])]
    times = [ours[-1][0], theirs[-1][0]]
    if ends[0] < ends[1]:
        times[0] = settled(ours, ends[1])
    elif ends[1] < ends[0]:
        times[1] = settled(theirs, ends[0])
    return times[1] / times[0]


def settled(curve: Curve, loss: float) -> float:
    """From when on it stays at or below this, straight lines between its points: a curve that dips
    below and comes back had not got there. At least a thousandth of its time, for one that begins
    there."""
    end, last = curve[-1]
    if not last <= loss:
        raise ValueError(f"a curve that ends with {last} does not stay at or below {loss}")
    above = [i for i, (_, value) in enumerate(curve) if value > loss]
    if not above:
        return end / 1000
    (t0, a), (t1, b) = curve[above[-1] : above[-1] + 2]
    return max(end / 1000, t0 + (t1 - t0) * (a - loss) / (a - b))


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
    parser.add_argument("--again", action="store_true", help="tell anew what was kept of this one")
    parser.add_argument("--dense", action="store_true", help="the default with dense steps")
    parser.add_argument("--rates", type=float, nargs="+", help="another grid")
    parser.add_argument("--tune", choices=("two", "all"), default="two", help="rates of whom")
    parser.add_argument("--data", type=Path, help="a folder with gsm8k-train.jsonl.gz")
    parser.add_argument("--quick", action="store_true", help="one seed, one second")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.seeds = 1.0, 1
    return options


if __name__ == "__main__":
    main()
