"""Does a router pay? Its mean cost, scoring counted, and its quality beside the strongest model's.

print(evaluation.verdict)  # Saves 34.1 % of nano-l's cost at 98.7 % of its quality (...)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pliant.errors import PliantError
from pliant.routing.units import TOKENIZERS, percent
from pliant.stats import Band, as_json

_SAME = 1 + 1e-9
"""Costs that differ by less are equal."""


class SavesNothing(PliantError):
    """A router that does not pay, so that it was not written. `fitted` or, where it was calibrated
    again, `calibrated` holds all that was measured."""

    def __init__(self, message: str, *, fitted: Any = None, calibrated: Any = None) -> None:
        self.fitted, self.calibrated = fitted, calibrated
        super().__init__(message)


@dataclass(frozen=True)
class Verdict:
    """What a router saves and loses against always asking the strongest model; `str` says it."""

    strongest: str
    cost: float
    """Of a prompt, in `unit`, scoring counted where it has a cost in that unit."""
    strongest_cost: float
    """Of a prompt, if the strongest model answers every one."""
    unit: str
    of_quality: Band
    """The router's quality as a share of the strongest model's."""
    over_random: Band
    """Its quality less that of a random choice with the same shares of calls: the control."""
    over_strongest: Band | None = None
    """Its quality less that of the strongest model alone; None in older files."""
    over_groups: Band | None = None
    """Its quality less that of the best fixed assignment of groups to models at the same cost,
    which knows the group of each prompt; None where the labels have no groups."""
    same_price: bool = False
    """Whether an answer costs the same whichever model gives it: then nothing can be saved, and
    more answers can be right."""
    scoring: float = 0.0
    """The mean cost of scoring a prompt, in `unit`; counted in `cost`."""
    scoring_ms: float | None = None
    """The time that it takes, where it was measured."""
    shares: tuple[float, ...] = ()
    """Of calls, by model; the strongest last."""
    reads_model: bool = False
    """Whether the scorer reads a model, which a scorer of text would save."""
    cheapest: str = ""
    """The cheapest model, the other control; empty in older files."""
    cheapest_cost: float = 0.0
    """Of a prompt, if the cheapest model answers every one."""
    cheapest_of_quality: float = 0.0
    """The quality of the cheapest model as a share of the strongest's."""
    goal_of_quality: float | None = None
    """The share of the strongest model's quality that the goal names; None if it names none."""

    @property
    def saved(self) -> float:
        """The share of the strongest model's cost that is saved; below 0 the router costs more."""
        if self.strongest_cost > 0:
            return 1 - self.cost / self.strongest_cost
        return math.nan if self.cost > 0 else 0.0

    @property
    def beaten_by_cheapest(self) -> bool:
        """Whether always asking the cheapest model costs no more and is no worse."""
        if self.cheapest in ("", self.strongest) or self.cost * _SAME < self.cheapest_cost:
            return False
        return self.of_quality.value <= self.cheapest_of_quality * _SAME

    @property
    def pays(self) -> bool:
        """Whether it is cheaper than the strongest model alone; or better, and no more expensive;
        or shown to be better, at any cost. It does not if the cheapest model alone does as well."""
        if self.beaten_by_cheapest:
            return False
        if self.cost * _SAME < self.strongest_cost:
            return True
        costs_the_same = self.cost <= self.strongest_cost * _SAME
        return (costs_the_same and self.of_quality.value > _SAME) or self.of_quality.low > 1

    @property
    def beats_random(self) -> bool:
        """Whether it was shown to be better than a random choice with the same shares of calls."""
        return self.over_random.low > 0

    @property
    def advice(self) -> str:
        """What to do; empty if the router pays and was shown to be better than chance."""
        if self.pays:
            return "" if self.beats_random else "More labels, or another scorer."
        if self.beaten_by_cheapest:
            return f"Always ask {self.cheapest}, or give more labels."
        if self.same_price:
            return f"Always ask {self.strongest}, or give more labels."
        if self.shares and self.shares[-1] == 1:
            return f"Every prompt goes to {self.strongest}: more labels, or another goal."
        if self.reads_model and self.cost - self.scoring < self.strongest_cost:
            return "Scoring costs more than it saves: --scorer text, or more labels."
        if self.strongest_cost <= self.cost - self.scoring:
            return f"Always ask {self.strongest}, or give more labels."
        return "More labels, or --scorer text."

    @property
    def scoring_note(self) -> str:
        """The time of scoring, where `cost` does not count it."""
        if self.scoring > 0 or self.scoring_ms is None:
            return ""
        if self.reads_model and self.unit == "flops":  # every answer continued from it
            return ""
        time = f"{self.scoring_ms:.3g} ms a prompt on the machine of the fit"
        return f"Scoring takes {time}, which the cost does not count."

    @property
    def goal_note(self) -> str:
        """That the goal was missed, where that was shown."""
        if self.goal_of_quality is None or not self.of_quality.high < self.goal_of_quality:
            return ""
        return (
            f"The goal was missed: {percent(self.goal_of_quality)} of {self.strongest}'s quality; "
            f"it is {percent(self.of_quality.value)}, and at most {percent(self.of_quality.high)}."
        )

    @property
    def groups_note(self) -> str:
        """The router beside the best fixed assignment of groups to models."""
        over = self.over_groups
        if over is None:
            return ""
        value, low, high = (100 * each for each in (over.value, over.low, over.high))
        return (
            f"Beside the best fixed assignment of groups to models at the same cost, which knows "
            f"the group of every prompt, the router has {value:+.1f} points of quality "
            f"[{low:+.1f}, {high:+.1f}]."
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the figures leave out, in sentences."""
        tokens = TOKENIZERS if self.unit == "tokens" else ""
        return tuple(filter(None, (self.goal_note, self.groups_note, self.scoring_note, tokens)))

    def paid_back(self, label_cost: float | None) -> float | None:
        """Prompts after which the router has saved what its labels cost; None if never."""
        saved = self.strongest_cost - self.cost
        return label_cost / saved if label_cost is not None and saved > 0 else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and what follows from them."""
        derived = {
            "saved": self.saved,
            "pays": self.pays,
            "beats_random": self.beats_random,
            "advice": self.advice,
            "notes": list(self.notes),
            "sentence": str(self),
        }
        return {**as_json(self), **as_json(derived)}

    @property
    def headline(self) -> str:
        """The first words alone: what is saved, at which quality."""
        share = percent(self.of_quality.value)
        quality = f"at {share} of its quality"
        if self.beaten_by_cheapest:
            alone = f"{percent(self.cheapest_of_quality)} of {self.strongest}'s quality"
            return (
                f"is no better than {self.cheapest} alone, which costs no more and has {alone}; "
                f"the router has {share}"
            )
        if self.cost * _SAME < self.strongest_cost:
            return f"saves {percent(self.saved)} of {self.strongest}'s cost {quality}"
        times = ""
        if self.cost > self.strongest_cost * _SAME:
            times = " at a cost where it has none"
            if self.strongest_cost > 0:
                ratio = self.cost / self.strongest_cost
                times = (
                    f" at {ratio:.3f} times its cost"
                    if ratio < 10
                    else " at a multiple of its cost"
                )
        more = percent(self.of_quality.value - 1)
        if self.same_price and self.over_strongest is not None:
            points = 100 * self.over_strongest.value
            than = f"prompts right than always asking {self.strongest}"
            if self.pays:
                return f"answers {points:.1f} points more {than},{times or ' at the same cost'}"
            fewer = f"{-points:.1f} points fewer" if points < -0.05 else "no more"
            return f"answers {fewer} {than}, which costs no more"
        if self.pays:
            return f"has {more} more quality than {self.strongest} alone{times}"
        if times:
            return f"saves nothing: {share} of the quality of {self.strongest} alone,{times}"
        return f"saves nothing: costs as much as {self.strongest} alone, {quality}"

    def __str__(self) -> str:
        head = f"{self.headline[0].upper()}{self.headline[1:]}"
        if not self.pays:
            return f"{head}. {self.advice}"
        if self.beats_random:
            less = f"{100 * self.over_random.value:.1f} points less quality"
            return f"{head}; a random choice of as many calls has {less}."
        chance = "not shown to be better than a random choice of as many calls"
        return f"{head}; {chance}. {self.advice}"
