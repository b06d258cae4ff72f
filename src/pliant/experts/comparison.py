"""Where an expert changes its base, and where two experts differ: by layer and projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import nan, sqrt
from typing import Any, Protocol

from pliant.experts.expert import Expert, Scales, scale_of

Grid = dict[str, list[float]]
"""Projection -> a value for each of the `columns`; NaN where a layer has none."""


class Placed(Protocol):
    """A row of a table by layer and projection."""

    @property
    def layer(self) -> int | None: ...
    @property
    def projection(self) -> str: ...


@dataclass(frozen=True)
class MatrixChange:
    """What an expert does to one matrix."""

    path: str
    layer: int | None
    projection: str
    numbers: int
    change: float
    """The root of the mean square of z - 1; with the singular values, the size of the change
    relative to the weight."""
    largest: float
    """Of |z - 1|."""


@dataclass(frozen=True)
class Profile:
    """What an expert changes."""

    numbers: int
    norm: float
    relative: bool
    """Whether changes are relative to the weights."""
    matrices: tuple[MatrixChange, ...]

    @classmethod
    def of(cls, expert: Expert, scales: Scales | None = None) -> Profile:
        rows = [
            MatrixChange(
                *_place(path), d.numel(), _size(expert, path, scales), float(d.abs().max())
            )
            for path, d in expert.changes.items()
        ]
        norm = expert.norm(scales)
        return cls(expert.numbers, norm, scales is not None, _in_order(rows))

    @property
    def layers(self) -> list[int]:
        """Those that it changes."""
        return sorted({m.layer for m in self.matrices if m.layer is not None and m.largest > 0})

    def grid(self) -> Grid:
        return grid(self.matrices, lambda m: m.change)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        most = max(self.matrices, key=lambda m: m.change)
        if not self.norm:
            return f"all {self.numbers:,} parameters z are 1: this expert is the base"
        what = "changes the weights by" if self.relative else "z differs from 1 by"
        share = f"{most.change:.2%}" if self.relative else f"{most.change:.3g}"
        return (
            f"{what} {share} in {_where(most)}, where it does most; norm {self.norm:.3g} over "
            f"{self.numbers:,} parameters in {len(self.matrices)} matrices"
        )


@dataclass(frozen=True)
class MatrixDifference:
    """How two experts differ in one matrix."""

    path: str
    layer: int | None
    projection: str
    difference: float
    """As `MatrixChange.change`, of their difference."""
    cosine: float


@dataclass(frozen=True)
class Comparison:
    """Where two experts differ."""

    names: tuple[str, str]
    distance: float
    cosine: float
    relative: bool
    matrices: tuple[MatrixDifference, ...]
    profiles: tuple[Profile, Profile] = field(repr=False)

    @classmethod
    def of(
        cls,
        first: Expert,
        second: Expert,
        scales: Scales | None = None,
        names: tuple[str, str] = ("the first", "the second"),
    ) -> Comparison:
        difference = first - second
        rows = []
        for path in difference.changes:
            parts = [_alone(expert, path) for expert in (first, second)]
            cosine = parts[0].cosine(parts[1], scales)
            rows.append(MatrixDifference(*_place(path), _size(difference, path, scales), cosine))
        return cls(
            names,
            difference.norm(scales),
            first.cosine(second, scales),
            scales is not None,
            _in_order(rows),
            (Profile.of(first, scales), Profile.of(second, scales)),
        )

    def grid(self) -> Grid:
        return grid(self.matrices, lambda m: m.difference)

    def grids(self) -> dict[str, Grid]:
        """Of each expert and of their difference."""
        first, second = self.profiles
        return {
            self.names[0]: first.grid(),
            self.names[1]: second.grid(),
            "where they differ": self.grid(),
        }

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        most = max(self.matrices, key=lambda m: m.difference)
        if not self.distance:
            return f"{self.names[0]} and {self.names[1]} are equal"
        return (
            f"{self.names[0]} and {self.names[1]} differ by {self.distance:.3g} (cosine "
            f"{self.cosine:.2f}), most in {_where(most)}"
        )


def grid(rows: Sequence[Any], value: Callable[[Any], float]) -> Grid:
    """A value for each projection and column; the matrices of a mixture's experts together."""
    squares: dict[str, dict[int | None, list[float]]] = {}
    for row in rows:
        squares.setdefault(row.projection, {}).setdefault(row.layer, []).append(value(row) ** 2)
    return {
        projection: [
            sqrt(sum(by[layer]) / len(by[layer])) if layer in by else nan for layer in columns(rows)
        ]
        for projection, by in squares.items()
    }


def columns(rows: Sequence[Placed]) -> list[int | None]:
    """The layers of a grid, in order; None, the first, for what lies outside of them."""
    layers: set[int | None] = {row.layer for row in rows}
    return sorted(layers, key=lambda layer: -1 if layer is None else layer)


def _size(expert: Expert, path: str, scales: Scales | None) -> float:
    d = expert.changes[path].double()
    weight = scale_of(path, d, scales)
    whole = sqrt(d.numel())
    if scales is not None:
        whole = float(scales[path].double().norm()) or 1.0
    return float((weight * d).norm()) / whole


def _alone(expert: Expert, path: str) -> Expert:
    """The expert in one matrix; as a value, with the settings of all."""
    own: Mapping[str, Any] = {p: d for p, d in expert.changes.items() if p == path}
    return Expert(own, expert.settings)


def _place(path: str) -> tuple[str, int | None, str]:
    """The path, its layer, and the projection in it; the experts of a mixture are one `*`."""
    names = [name for name in path.split(".") if name != "base_layer"]
    at = next((i for i, name in enumerate(names) if name.isdigit()), None)
    nested = path.count("base_layer")
    end = f" ({nested + 1})" if nested else ""
    if at is None:
        return path, None, ".".join(names) + end
    inner = ["*" if name.isdigit() else name for name in names[at + 1 :]]
    return path, int(names[at]), ".".join(inner) + end


def _in_order(rows: list[Any]) -> tuple[Any, ...]:
    return tuple(sorted(rows, key=lambda row: -1 if row.layer is None else row.layer))


def _where(row: Placed) -> str:
    return row.projection if row.layer is None else f"layer {row.layer}'s {row.projection}"
