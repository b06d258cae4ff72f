"""Close the experts of a mixture that matter least, so that routers choose among the others.

    closed = close_experts(model, batches, 0.5)
    print(closed)           # 24 of 48 experts closed by relative_activation, 8 in each of 3 layers
    export(model, "smaller")
    closed.detach()         # or: all of them are open again

A stock checkpoint has one number of experts for all layers, so every layer loses as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.anatomy.config import read
from pliant.errors import InvalidInput
from pliant.structure.calibration import Batch
from pliant.structure.pruning.remaining_experts import RemainingExperts, attach
from pliant.structure.ranking.importance import ImportanceConfig, importance
from pliant.structure.ranking.measures import Progress, Score
from pliant.structure.units import Site, sites_of

GROUP_COUNTS = ("n_group", "num_expert_group", "n_groups")


@dataclass(frozen=True, eq=False)
class ClosedExperts:
    """The adapter that closes experts, and which they are."""

    adapter: RemainingExperts
    removed: dict[str, tuple[int, ...]]
    """By site, from the least important upwards."""
    count: int
    """How many experts a layer had."""
    score: Score

    @classmethod
    def of(cls, adapter: RemainingExperts, score: Score) -> ClosedExperts:
        """An adapter that is attached already."""
        count = sites_of(adapter.anatomy, ["experts"])[0].count
        return cls(adapter, dict(adapter.config.removed), count, score)

    def detach(self) -> None:
        self.adapter.detach()

    def as_dict(self) -> dict[str, Any]:
        removed = {key: list(units) for key, units in self.removed.items()}
        return {"removed": removed, "count": self.count, "score": self.score}

    def __str__(self) -> str:
        layers = len(self.removed)
        each = len(next(iter(self.removed.values())))
        return (
            f"{each * layers:,} of {self.count * layers:,} experts closed by {self.score}, {each} "
            f"in each of {layers} layers"
        )


def close_experts(
    model: nn.Module,
    batches: Sequence[Batch],
    share: float,
    score: Score = "relative_activation",
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> ClosedExperts:
    """Close a share of every layer's experts, those that the score ranks lowest on the batches.

    `score` is one of `importance`'s for experts, such as "relative_activation" (the mean norm of
    what an expert adds to a token, weighed by the router, as a share of that of the token's hidden
    state), "frequency" or "random". Where a router chooses among groups of experts, each group
    loses as many.
    """
    anatomy = Anatomy.of(model)
    sites = sites_of(anatomy, ["experts"])
    _check_share(sites, share)
    config = ImportanceConfig(("experts",), score, seed=seed)
    scores = importance(model, batches, config, progress=progress).units["experts"]
    groups = _groups(anatomy)
    removed = {s.key: _lowest(scores[s.key], round(share * s.count), groups) for s in sites}
    return ClosedExperts(attach(model, removed), removed, sites[0].count, score)


def _check_share(sites: list[Site], share: float) -> None:
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise InvalidInput(f"share = {share!r}: give a number between 0 and 1")
    for site in sites:
        if not 0 < round(share * site.count) < site.count:
            raise InvalidInput(
                f"share = {share}: of {site.count} experts in layer {site.layer} that is "
                f"{round(share * site.count)}; give a share that removes one at least and keeps one"
            )


def _groups(anatomy: Anatomy) -> int:
    counts = [read(anatomy.config, name) for name in GROUP_COUNTS]
    return next((count for count in counts if isinstance(count, int) and count > 1), 1)


def _lowest(scores: Tensor, count: int, groups: int) -> tuple[int, ...]:
    """The units with the lowest scores, from the lowest upwards; of each group as many."""
    if len(scores) % groups or count % groups:
        raise InvalidInput(
            f"{count} of {len(scores)} experts are to go, and the router chooses among {groups} "
            f"groups of them: remove a multiple of {groups}"
        )
    by_group = scores.view(groups, -1).argsort(dim=1, stable=True)[:, : count // groups]
    size = len(scores) // groups
    units = [group * size + unit for group, own in enumerate(by_group.tolist()) for unit in own]
    return tuple(sorted(units, key=lambda unit: float(scores[unit])))
