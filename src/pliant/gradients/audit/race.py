"""A short race on the user's own data: the same start and the same budget to each, and who ends
with the lower loss on held-out rows?

    ran = race(model, rows, held_out, GradientConfig(), seconds=20)
    print(ran.sentence)

A step's cost is measured first, turn by turn, so that whatever disturbs the machine disturbs all
alike; the budget then buys each so many steps. A contender is trained, measured, and put back.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pliant.anatomy.find import unwrap
from pliant.data.collate import Collator
from pliant.errors import InvalidInput
from pliant.gradients.audit.audit import TURNS, Progress, cost_share, no_progress, placed
from pliant.gradients.audit.contenders import (
    STANDARD,
    Batch,
    Contender,
    Field,
    clear_gradients,
    fewer_rows,
    restored,
    row_sums,
    steady,
    trained,
)
from pliant.gradients.audit.result import Race, Run
from pliant.gradients.audit.step import operations, wait
from pliant.gradients.config import GradientConfig
from pliant.gradients.selector import Router, Schedule

Row = Mapping[str, Any]
Collate = Callable[[Any], Batch]
SEEDS, POINTS = 3, 5
WARMUP, CLIP = 0.05, 1.0
"""The share of the steps in which the learning rate rises (then it falls to 0), and the length that
no step's gradient exceeds."""
LATE = 8
"""A running average of the weights covers about the last ninth of the steps."""


@dataclass(frozen=True)
class Terms:
    """How every contender trains."""

    batch_size: int
    lr: float | Mapping[Contender, float]
    collate: Collate
    average_weights: bool
    clock: Callable[[], float]

    def lr_of(self, contender: Contender) -> float:
        return self.lr[contender] if isinstance(self.lr, Mapping) else self.lr


def race(
    model: nn.Module,
    train_rows: Sequence[Row],
    eval_rows: Sequence[Row],
    config: GradientConfig | None = None,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    seeds: int | Sequence[int] = SEEDS,
    batch_size: int = 8,
    lr: float | Mapping[Contender, float] = 1e-4,
    average_weights: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    points: int = POINTS,
    turns: int = TURNS,
    contenders: Sequence[Contender] | None = None,
    collate: Collate | None = None,
    router: Router | None = None,
    progress: Progress | None = None,
) -> Race:
    """Train each contender from the model's present weights for `seconds`, or for the operations of
    so many standard `steps`, once for each seed.

    A row holds `input_ids` and, where not all of it is to be learned, `labels`; with a `collate`,
    whatever that makes a batch of. Every contender draws its batches from the same rows in the same
    order, with AdamW and a learning rate that falls to 0 at its own end. `lr` may differ between
    contenders. With `average_weights` the rate stays, and what is evaluated is a running average of
    the weights, so that a point of a curve does not depend on where the curve ends. `clock` times
    the steps: `time.process_time` ignores other processes.
    """
    config, model = config or GradientConfig(), unwrap(model)
    seeds = range(seeds) if isinstance(seeds, int) else seeds
    _check(train_rows, eval_rows, batch_size, seeds, seconds, steps, turns)
    size = min(batch_size, len(train_rows))
    terms = Terms(size, lr, collate or Collator(), average_weights, clock)
    weights = SavedWeights(model)
    with restored(model):
        first = placed(next(_batches(train_rows, terms, 0)), model)
        if contenders is None:
            share = cost_share(model, first, config, router)
            contenders = entrants(config, share, terms.batch_size)
        others = [contender for contender in contenders if contender != STANDARD]
        try:
            with Field(model, [*others, STANDARD], router) as field:
                return _Course(field, train_rows, eval_rows, terms, weights, turns).run(
                    seconds, steps, seeds, points, progress or no_progress
                )
        finally:
            weights.restore()


def entrants(config: GradientConfig, share: float | None, rows: int) -> list[Contender]:
    """The configuration, random tokens through the same engine, and batches of fewer sequences."""
    ours = steady(config)
    configs = [ours]
    if config.engine != "completion":
        configs.append(replace(ours, selection="uniform", score="gradient", exit_layer=None))
    tokens = [Contender("tokens", choice) for choice in dict.fromkeys(configs)]
    return [*tokens, *fewer_rows(config, share, rows)]


class _Course:
    """The race itself."""

    def __init__(
        self,
        field: Field,
        train_rows: Sequence[Row],
        eval_rows: Sequence[Row],
        terms: Terms,
        weights: SavedWeights,
        turns: int,
    ) -> None:
        self.field, self.terms, self.weights, self.turns = field, terms, weights, turns
        self.train_rows = train_rows
        self.model = field.model
        self.held_out = [
            placed(terms.collate(eval_rows[at : at + terms.batch_size]), self.model)
            for at in range(0, len(eval_rows), terms.batch_size)
        ]

    def run(
        self,
        seconds: float | None,
        steps: int | None,
        seeds: Sequence[int],
        points: int,
        progress: Progress,
    ) -> Race:
        pace, shares = self._pace()
        cost = pace if seconds is not None else {c: share or 1.0 for c, share in shares.items()}
        costs = {}
        for contender in self.field.contenders:
            budget = seconds if seconds is not None else (steps or 0) + cost[contender] / 2
            costs[contender] = step_costs(contender, cost[contender], cost[STANDARD], budget)
        nll_0, counts = self._evaluate()
        begin = float(nll_0.sum() / counts.sum())
        laps = [(seed, c) for seed in seeds for c in self.field.contenders]
        ends: dict[Contender, list[Any]] = {c: [] for c in self.field.contenders}
        for seed, contender in progress(laps, "racing"):
            ends[contender].append(self._lap(contender, seed, costs[contender], points))
        runs = tuple(
            Run(
                contender=c,
                steps=len(costs[c]),
                seconds_a_step=pace[c] + dense_share(c, len(costs[c])) * (pace[STANDARD] - pace[c]),
                operations_a_step=shares[c],
                curves=tuple(((0.0, begin), *curve) for curve, _ in ends[c]),
                losses=np.stack([nll for _, nll in ends[c]]),
            )
            for c in self.field.contenders
        )
        return Race(runs, counts, seconds, steps)

    def _pace(self) -> tuple[dict[Contender, float], dict[Contender, float | None]]:
        """The seconds of a training step, the optimizer's own among them; and its operations.

        Dense steps cost what standard training's do: the schedule is measured at its end.
        """
        clock, contenders = self.terms.clock, self.field.contenders
        taken: dict[Contender, list[float]] = {c: [] for c in contenders}
        shares: dict[Contender, float | None] = {}
        optimizer = self._optimizer(min(map(self.terms.lr_of, contenders)))
        batches = _batches(self.train_rows, self.terms, 0)
        for contender in contenders:
            self.field.restart(contender, at_end=True)
        for turn in range(self.turns + 1):
            batch = placed(next(batches), self.model)
            for contender in contenders:
                wait(self.model)
                begun = clock()
                self._step(contender, batch, turn, optimizer)
                wait(self.model)
                if turn:  # the first is a warm-up
                    taken[contender].append(clock() - begun)
                shares[contender] = operations(self.field, contender)
        self.weights.restore()
        return {c: statistics.median(times) for c, times in taken.items()}, shares

    def _lap(
        self, contender: Contender, seed: int, costs: Sequence[float], points: int
    ) -> tuple[Any, Any]:
        """Its loss curve, as (share of the budget, loss), and the last losses row by row."""
        self.weights.restore()
        self.field.restart(contender)
        torch.manual_seed(seed)
        steps, spent = len(costs), np.cumsum(costs)
        optimizer, lr = self._optimizer(), self.terms.lr_of(contender)
        average = RunningAverage(self.weights.parameters) if self.terms.average_weights else None
        stops = {max(1, round(steps * (i + 1) / points)) for i in range(points)}
        curve, nll = [], None
        for step, batch in zip(range(steps), _batches(self.train_rows, self.terms, seed)):  # noqa: B905
            for group in optimizer.param_groups:
                group["lr"] = lr * _rate(step, steps, falls=average is None)
            here = placed(batch, self.model)
            self._step(contender, here, seed * 1_000_003 + step, optimizer)
            if average is not None:
                average.update(step)
            if step + 1 in stops:
                with nullcontext() if average is None else average.in_place():
                    nll, counts = self._evaluate()
                share = float(spent[step] / spent[-1])
                curve.append((share, float(nll.sum() / counts.sum())))
        return tuple(curve), nll

    def _step(
        self, contender: Contender, batch: Batch, draw: int, optimizer: torch.optim.Optimizer
    ) -> None:
        clear_gradients(self.model)
        self.field.step(contender, batch, draw)
        nn.utils.clip_grad_norm_(self.weights.parameters, CLIP)
        optimizer.step()

    def _optimizer(self, lr: float = 0.0) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.weights.parameters, lr=lr, weight_decay=0.0)

    def _evaluate(self) -> tuple[Any, Any]:
        """The summed loss of each held-out row, and how many tokens it has."""
        self.model.eval()
        parts = [row_sums(self.model, batch, "loss") for batch in self.held_out]
        self.model.train()
        losses, counts = (torch.cat(side).cpu().numpy() for side in zip(*parts, strict=True))
        return losses, counts


class SavedWeights:
    """The values of the trained parameters, on the CPU; `restore` may be called repeatedly."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = trained(model)
        self.values: list[Tensor] = [p.detach().to("cpu", copy=True) for p in self.parameters]

    @torch.no_grad()
    def restore(self) -> None:
        for p, value in zip(self.parameters, self.values, strict=True):
            p.copy_(value)


class RunningAverage:
    """A running average of a model's weights over the late steps."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.values: list[Tensor] = [p.detach().clone() for p in parameters]

    def update(self, step: int) -> None:
        for value, p in zip(self.values, self.parameters, strict=True):
            value.lerp_(p.detach(), (LATE + 1) / (step + 1 + LATE))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, p in enumerate(self.parameters):
            p.data, self.values[i] = self.values[i], p.data


def step_costs(contender: Contender, cost: float, dense_cost: float, budget: float) -> list[float]:
    """The cost of each step that the budget buys: at least one."""
    costs: list[float] = []
    left = budget * (1 + 1e-9)
    for dense in _dense_steps(contender):
        next_cost = dense_cost if dense else cost
        if costs and next_cost > left:
            break
        costs.append(next_cost)
        left -= next_cost
    return costs


def dense_share(contender: Contender, steps: int) -> float:
    """Of so many steps, the share that trains every token."""
    return sum(islice(_dense_steps(contender), steps)) / steps


def _dense_steps(contender: Contender) -> Iterator[bool]:
    """Endless: whether the schedule lets this step train every token."""
    schedule = Schedule(contender.config or GradientConfig())
    while True:
        yield schedule.is_dense()
        schedule.forward_seen()


def _batches(rows: Sequence[Row], terms: Terms, seed: int) -> Iterator[Batch]:
    """Endless; each epoch in a new order, the same for all contenders."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for at in range(0, len(rows) - terms.batch_size + 1, terms.batch_size):
            yield terms.collate([rows[i] for i in order[at : at + terms.batch_size]])


def _rate(step: int, steps: int, falls: bool) -> float:
    rising = (step + 1) / max(1.0, WARMUP * steps)
    return min(1.0, rising, (steps - step) / steps if falls else 1.0)


def _check(
    train_rows: Sequence[Row],
    eval_rows: Sequence[Row],
    batch_size: int,
    seeds: Sequence[int],
    seconds: float | None,
    steps: int | None,
    turns: int,
) -> None:
    if not train_rows or not eval_rows:
        raise InvalidInput(
            f"a race needs rows to train on and others to be measured on, not {len(train_rows)} "
            f"and {len(eval_rows)}"
        )
    for name, value in (("batch_size", batch_size), ("seeds", len(seeds)), ("turns", turns)):
        if value < 1:
            raise InvalidInput(f"{name} = {value}: give 1 or more")
    if (seconds is None) == (steps is None):
        raise InvalidInput(
            "a race takes a number of seconds, or of standard steps: give one of them"
        )
    budget = seconds if seconds is not None else steps
    if budget is None or not budget > 0:
        raise InvalidInput(f"a budget of {budget}: give more than 0")
