"""The rows of the `cggr` package's page (why to use it, and its performance), as we measure them.

    python -m benchmarks.gradient_seed_table [--rounds 5] [--seconds 4] [--quick]

An 8-layer Llama (hidden 256), a vocabulary of 8,192, 8 x 256 random tokens: operations are counted
(those of matrix products and attention), times are process time on one thread, forward and backward
apart, interleaved. Memory is what a step adds to a process of its own. The page's race, one
sequence a step against four, is run on Python source from scratch, 3 seeds, to the same time.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gradient_step
from benchmarks.gradient_race import curves_of, raced, speedup
from benchmarks.gradient_ways import CGGR_MODEL, REGIMES
from benchmarks.harness import keep
from pliant import CGGRLoss, CGGRModel, create_truncated_router
from pliant.gradients import GradientConfig, attach
from pliant.gradients.audit.contenders import STANDARD, Contender
from pliant.gradients.audit.result import t_band

SETTING = gradient_step.SETTINGS[0]
CLAIMS = {
    "backward operations": "25 %",
    "backward time": "25 % (4x cheaper)",
    "forward operations": "",
    "forward time": "~110 %, overhead ~0 %",
    "speed": "1.4x - 2.0x",
    "memory": "lower",
    "sequences in the same time": "4.08x (4 a step, against 1)",
    "loss after it": "-73 %",
}
Loss = Callable[[], Tensor]


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    steps = {name: make() for name, make in STEPS.items()}
    figures: dict[str, Any] = {"claimed": CLAIMS, "step": step_figures(steps, options.rounds)}
    if not options.quick:
        figures["race"] = race_figures(options.seconds, options.seeds)
    show(figures)
    keep("gradient_seed_table", figures, "python -m benchmarks.gradient_seed_table")


# --- a step --------------------------------------------------------------------------------------


def step_figures(steps: dict[str, tuple[Any, Loss]], rounds: int) -> dict[str, dict[str, float]]:
    """Everything as a share of standard training's; speed is its time over ours."""
    seconds_of: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds = _timed(*steps[name])
            if turn:
                seconds_of[name].append(seconds)
    counted = {name: _counted(*step) for name, step in steps.items()}
    figures = {}
    for name in steps:
        pairs = list(zip(seconds_of[name], seconds_of["standard"], strict=True))
        figures[name] = {
            "forward time": median(a[0] / b[0] for a, b in pairs),
            "backward time": median(a[1] / b[1] for a, b in pairs),
            "speed": median(sum(b) / sum(a) for a, b in pairs),
            "forward operations": counted[name][0] / counted["standard"][0],
            "backward operations": counted[name][1] / counted["standard"][1],
        }
    for name, step_name in MEMORY.items():
        bytes_of = gradient_step._peak_in_a_process(step_name, SETTING)
        figures[name]["mebibytes"] = bytes_of / 2**20
    for name in MEMORY:
        figures[name]["memory"] = figures[name]["mebibytes"] / figures["standard"]["mebibytes"]
    return figures


def _timed(model: Any, loss_of: Loss) -> tuple[float, float]:
    model.zero_grad(set_to_none=True)
    begun = time.process_time()
    loss = loss_of()
    middle = time.process_time()
    loss.backward()
    return middle - begun, time.process_time() - middle


def _counted(model: Any, loss_of: Loss) -> tuple[int, int]:
    model.zero_grad(set_to_none=True)
    with FlopCounterMode(display=False) as forward:
        loss = loss_of()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def _standard() -> tuple[Any, Loss]:
    model, ids = gradient_step._model(SETTING), gradient_step._ids(SETTING)
    return model, lambda: model(input_ids=ids, labels=ids).loss


def _ours() -> tuple[Any, Loss]:
    model, loss_of = _standard()
    attach(model, GradientConfig(ratio=0.25))
    return model, loss_of


def _split(wrapper: Any, router_of: Any) -> tuple[Any, Loss]:
    """In its steady state: the warm-up is over."""
    model, ids = gradient_step._model(SETTING), gradient_step._ids(SETTING)
    wrapped = wrapper(model, router=router_of(model, num_layers=4), warmup_steps=1)
    wrapped.train()
    wrapped.step()
    return model, lambda: wrapped(ids, labels=ids)


def _criterion(kind: Any) -> tuple[Any, Loss]:
    model, ids = gradient_step._model(SETTING), gradient_step._ids(SETTING)
    criterion = kind(min_tokens_ratio=0.25, warmup_steps=1)
    criterion.step()
    targets = ids[:, 1:].contiguous()
    return model, lambda: criterion(model(input_ids=ids).logits[:, :-1].contiguous(), targets)


def _their_model() -> tuple[Any, Loss]:
    import cggr

    return _split(cggr.CGGRModel, cggr.create_truncated_router)


def _their_loss() -> tuple[Any, Loss]:
    import cggr

    return _criterion(cggr.CGGRLoss)


STEPS: dict[str, Callable[[], tuple[Any, Loss]]] = {
    "standard": _standard,
    "cggr's CGGRModel": _their_model,
    "cggr's CGGRLoss": _their_loss,
    "our CGGRModel": lambda: _split(CGGRModel, create_truncated_router),
    "our CGGRLoss": lambda: _criterion(CGGRLoss),
    "our default, sparse .25": _ours,
}
MEMORY = {
    "standard": "standard",
    "cggr's CGGRModel": "CGGRModel",
    "cggr's CGGRLoss": "CGGRLoss",
    "our default, sparse .25": "sparse .25",
}
"""Their names in `gradient_step`."""


# --- the page's race -----------------------------------------------------------------------------


def race_figures(seconds: float, seeds: int) -> dict[str, Any]:
    """Standard training on one sequence a step and everything else on four, for the same time."""
    scratch = REGIMES["scratch"]
    rows = scratch.rows(argparse.Namespace())
    default = Contender("tokens", GradientConfig(ratio=0.25))
    fields = {1: [STANDARD], 4: [STANDARD, CGGR_MODEL, default]}
    races = {
        size: [
            raced(replace(scratch, size=size), rows, field, 2e-3, seconds, seed)
            for seed in range(seeds)
        ]
        for size, field in fields.items()
    }
    entrants = {
        "standard": (1, STANDARD),
        "standard, 4 a step": (4, STANDARD),
        "cggr's CGGRModel": (4, CGGR_MODEL),
        "our default, sparse .25": (4, default),
    }
    curves = {name: curves_of(it, races[size]) for name, (size, it) in entrants.items()}
    pace = {
        name: float(np.mean([race[it.name].seconds_a_step for race in races[size]]))
        for name, (size, it) in entrants.items()
    }
    figures = {}
    for name, (size, _) in entrants.items():
        ends = np.array([curve[-1][1] for curve in curves[name]])
        figures[name] = {
            "milliseconds a step": 1000 * pace[name],
            "sequences in the same time": size * pace["standard"] / pace[name],
            "loss": t_band(ends, 0.95).as_dict(),
            "times as fast as standard": speedup(curves[name], curves["standard"]).as_dict(),
        }
    return {"seconds": seconds, "seeds": seeds, "rate": 2e-3, "entrants": figures}


# --- what is printed -----------------------------------------------------------------------------


def show(figures: dict[str, Any]) -> None:
    step, race = figures["step"], figures.get("race", {}).get("entrants", {})
    table = Table(title="the seed's rows, as shares of standard training")
    for column in ("", "claimed", *step):
        table.add_column(column, justify="right" if column else "left")
    for row, claim in CLAIMS.items():
        cells = (_cell(row, step[name], race.get(name)) for name in step)
        table.add_row(row, claim, *cells)
    Console(width=150).print(table)


def _cell(row: str, step: dict[str, float], race: dict[str, Any] | None) -> str:
    if row in step:
        return f"{step[row]:.2f}"
    if race is None:
        return ""
    if row == "loss after it":
        return f"{race['loss']['value']:.3f}"
    return f"{race[row]:.2f}" if row in race else ""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of the race, each, a seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="without the race")
    return parser.parse_args()


if __name__ == "__main__":
    main()
