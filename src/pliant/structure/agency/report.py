"""What Agency reports: the state of each head, and every transition and violation so far."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

State = Literal["active", "overloaded", "misaligned", "withdrawn"]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class HeadReport:
    """One head as it is now."""

    layer: int
    block: int
    head: int
    state: State
    consent: bool
    weight: float
    """What its state multiplies its gate by."""
    utilisation: float
    """The running average of 1 - H(attention) / log T."""
    misalignment: float
    """The running average of the loss's derivative with respect to its gate, as a share of the
    root mean square of these in its layer. Above 0, closing the gate would lower the loss."""


@dataclass(frozen=True)
class Transition:
    """One change of a head's state or consent."""

    observation: int
    layer: int
    block: int
    head: int
    before: State
    after: State
    consent: bool
    """After the change."""
    reason: str


@dataclass(frozen=True)
class Violation:
    """An attempt to use a head that is locked: refused, or without effect."""

    observation: int
    layer: int
    block: int
    head: int
    reason: str


@dataclass(frozen=True)
class AgencyReport:
    """The heads' states, and how they came about."""

    observations: int
    heads: tuple[HeadReport, ...]
    transitions: tuple[Transition, ...]
    violations: tuple[Violation, ...]

    @property
    def counts(self) -> dict[State, int]:
        """How many heads are in each state."""
        counts = Counter(head.state for head in self.heads)
        return {state: counts[state] for state in STATES}

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**asdict(self), "counts": self.counts}

    def __str__(self) -> str:
        states = ", ".join(f"{count} {state}" for state, count in self.counts.items() if count)
        without = sum(not head.consent for head in self.heads)
        return (
            f"Of {len(self.heads)} heads, {states}; {without} without consent, and "
            f"{len(self.violations)} violations in {self.observations} observations."
        )
