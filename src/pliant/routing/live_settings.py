"""The parts of router.json that say how a router behaves while it runs.

Sessions, drift, settings of answers, the ledger, and exploring.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pliant.routing.backends import Settings
from pliant.routing.strict import Amount, Count, Finite, Part, Share


class Sticky(Part):
    """How a session keeps to a model."""

    policy: Literal["stay", "upgrade", "off"] = "stay"
    """stay: its first model; upgrade: another one as soon as that is preferred as likelier right,
    not for its price (of two models with a threshold of the gain, the stronger one alone); off: no
    sessions."""
    limit: Count = 10_000
    """How many sessions are remembered; the longest unused is forgotten first."""
    ttl: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds after which an unused session is forgotten."""


class Drift(Part):
    """The scores that the router was fitted for, and when others count as a change."""

    edges: list[Finite]
    """Ascending scores."""
    below: list[Share]
    """The share of the reference at or below each of them."""
    n: Count
    """How many scores the reference had."""
    window: Annotated[int, Field(ge=20)] = 500
    """How many scores are compared with it at a time."""
    false_alarms: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """The chance of ever raising an alarm if nothing changes."""

    @model_validator(mode="after")
    def _fits(self) -> Drift:
        ascending = all(
            all(a <= b for a, b in zip(row, row[1:], strict=False))
            for row in (self.edges, self.below)
        )
        if not ascending or len(self.edges) != len(self.below) or not self.edges:
            raise ValueError("edges and below must be of one length and ascending")
        return self


class SettingsBand(Part):
    """How to answer prompts up to a score; settings left out are the caller's."""

    up_to: Share
    temperature: Amount | None = None
    max_new_tokens: Count | None = None
    samples: Count | None = None

    @model_validator(mode="after")
    def _fits(self) -> SettingsBand:
        if (self.samples or 1) > 1 and self.temperature == 0:
            raise ValueError("several samples at temperature 0 repeat the same answer")
        return self

    def over(self, settings: Settings) -> Settings:
        """The settings, replaced by those that this band states."""
        own = self.model_dump(exclude={"up_to"}, exclude_none=True)
        return Settings(**{**vars(settings), **own})


class LedgerEntry(Part):
    """Where decisions are recorded."""

    path: str | None = "ledger.sqlite"
    """Beside router.json unless absolute; null: in memory."""
    prompts: bool = False
    """Whether to store the prompts' text; otherwise a salted hash."""


class Explore(Part):
    """Of novel prompts, some are asked of every model, so that the router can learn from them."""

    share: Share = 0.0
    """Of the novel prompts. A prompt that is asked again is decided on in the same way."""
