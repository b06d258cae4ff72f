"""Which trained numbers set which gates, and how many of them a budget closes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pliant.errors import InvalidInput
from pliant.structure.units import Site


@dataclass(frozen=True, eq=False)
class Span:
    """The numbers of one site, among those of all; each sets `repeats` gates."""

    site: Site
    start: int
    count: int
    repeats: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.count)


@dataclass(frozen=True)
class Group:
    """Numbers that share a budget: `closed` of them end closed."""

    start: int
    stop: int
    closed: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


def spans_of(sites: Sequence[Site], kv_groups: bool) -> list[Span]:
    """One number for each gate, or for all heads that share a KV head."""
    spans: list[Span] = []
    start = 0
    for site in sites:
        count = site.groups if kv_groups and site.kind == "heads" else site.count
        spans.append(Span(site, start, count, site.count // count))
        start += count
    return spans


def groups_of(spans: Sequence[Span], budget: float, uniform: bool) -> list[Group]:
    """One group for each kind, or for each site if every layer is to close the same share."""
    members: dict[tuple[str, ...], list[Span]] = {}
    for span in spans:
        name = (span.site.kind, span.site.key) if uniform else (span.site.kind,)
        members.setdefault(name, []).append(span)
    return [_group(name, own, budget) for name, own in members.items()]


def _group(name: tuple[str, ...], spans: Sequence[Span], budget: float) -> Group:
    start = spans[0].start
    stop = spans[-1].start + spans[-1].count
    closed = int(budget * (stop - start) + 0.5)
    if 0 < closed < stop - start:
        return Group(start, stop, closed)
    where = " in layer ".join(name)
    raise InvalidInput(
        f"budget = {budget!r} closes {closed} of {stop - start} {where}: give one that closes some "
        "and leaves some"
    )
