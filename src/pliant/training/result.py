"""What a training run reached, and whether its loss fell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FEWEST_STEPS = 10
"""Single steps differ too much: where a run began and ended is a mean over at least so many."""


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to; the seconds are those since it was resumed."""

    steps: int
    first_loss: float
    """As logged first, a mean over `logging_steps`; and last."""
    last_loss: float
    losses: tuple[float, float] | None
    """The means over the first and over the last steps, at least `FEWEST_STEPS` each; None if there
    were too few to tell whether the loss fell."""
    eval_loss: float | None
    seconds: float
    resumed_at: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.losses is None:
            return f"{self.steps} {self.steps_word}: too few to tell whether the loss fell"
        first, last = self.losses
        return f"{self.steps} steps took the loss from {first:.4f} to {last:.4f}"

    @property
    def steps_word(self) -> str:
        return "step" if self.steps == 1 else "steps"

    def cells(self) -> list[list[str]]:
        """The rows of the final table: what, and how much."""
        resumed = f" (from {self.resumed_at} on)" if self.resumed_at else ""
        evaluated = [] if self.eval_loss is None else [f"{self.eval_loss:.4f}"]
        return [
            ["steps", f"{self.steps}{resumed}"],
            *self.loss_cells(),
            *(["loss on evaluation data", loss] for loss in evaluated),
            ["seconds", f"{self.seconds:.1f}"],
        ]

    def loss_cells(self) -> list[list[str]]:
        """Where the loss began and ended, if there were enough steps to tell."""
        if self.losses is None:
            missing = f"{self.steps} {self.steps_word}: too few to tell whether it fell"
            return [["loss", f"{self.last_loss:.4f}; {missing}"]]
        first, last = self.losses
        return [["loss of the first steps", f"{first:.4f}"], ["of the last", f"{last:.4f}"]]


def ends_of(
    history: Sequence[Mapping[str, Any]], key: str, fewest: int = FEWEST_STEPS
) -> tuple[float, float] | None:
    """The means of what was logged over the first and over the last steps, `fewest` or more each;
    None if these would overlap.

    What is logged is the mean since the log before it.
    """
    logs = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
    starts = [0, *(step for step, _ in logs)]
    spans = [(step - start, value) for start, (step, value) in zip(starts, logs, strict=False)]
    first, last = _span_mean(spans, fewest), _span_mean(spans[::-1], fewest)
    if first is None or last is None or first[0] + last[0] > len(spans):
        return None
    return first[1], last[1]


def _span_mean(spans: Sequence[tuple[int, float]], fewest: int) -> tuple[int, float] | None:
    """How many of the first spans cover so many steps, and the mean over them."""
    covered, total = 0, 0.0
    for count, (steps, value) in enumerate(spans, start=1):
        covered, total = covered + steps, total + steps * value
        if covered >= fewest:
            return count, total / covered
    return None
