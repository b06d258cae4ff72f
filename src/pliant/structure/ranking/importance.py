"""How much each unit of a model matters: one score for every head, channel, expert or layer.

    batches = calibration_batches(read_rows("notes.txt"), tokenizer)
    scores = importance(model, batches, ImportanceConfig(units=("heads", "channels")))
    scores.lowest("heads", 0.25)            # the units that matter least, layer by layer

Gradients come from gates that are attached for the measurement and detached after it; the model
stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.anatomy.find import device_of
from pliant.anatomy.modes import eval_mode
from pliant.errors import (
    CorruptFile,
    InvalidInput,
    check_choice,
    check_whole,
    did_you_mean,
    named_settings,
)
from pliant.structure.calibration import Batch, samples_of
from pliant.structure.config import GateConfig, Kind
from pliant.structure.ranking.measures import (
    MEASURES,
    NEEDS_NO_TEXT,
    RANKS,
    SCORES,
    Job,
    Progress,
    Score,
    scores_for,
)
from pliant.structure.units import Site, sites_of


@named_settings
@dataclass(frozen=True)
class ImportanceConfig:
    """What is ranked, and by which score."""

    units: tuple[Kind, ...] = ("heads",)
    """Kinds of units: "heads", "channels", "experts", "layers", "attention", "mlp"."""
    score: Score = "fisher"
    """By gradients: "fisher", "taylor"; by a forward pass for each unit: "leave_one_out"; by one
    forward pass: "activation", and "entropy" (heads), "block_influence" (layers), "frequency"
    and "relative_activation" (experts); without text: "magnitude", "random"."""
    seed: int = 0
    """For "random"."""

    def __post_init__(self) -> None:
        if not self.units:
            raise InvalidInput(f"units = {self.units!r}: name a kind of units to rank")
        object.__setattr__(self, "units", GateConfig(self.units).units)
        check_choice("score", self.score, SCORES)
        check_whole("seed", self.seed, 0)
        for kind in self.units:
            if kind not in RANKS[self.score]:
                raise InvalidInput(
                    f"score = {self.score!r} ranks {', '.join(RANKS[self.score])}, not {kind}: "
                    f"for {kind} give one of {', '.join(scores_for(kind))}"
                )


def importance(
    model: nn.Module,
    batches: Iterable[Batch] = (),
    config: ImportanceConfig | None = None,
    *,
    progress: Progress | None = None,
    resume: str | Path | None = None,
) -> Importance:
    """Score every unit of the chosen kinds on calibration text.

    A batch holds `input_ids`, and may hold an `attention_mask` and `labels`; padding counts
    nowhere. `progress(done, total)` is called after each step. `resume` names a file (.jsonl) in
    which leave_one_out notes each unit as it goes, and from which it goes on.
    """
    config = config or ImportanceConfig()
    if resume is not None and config.score != "leave_one_out":
        raise InvalidInput(f"resume = {str(resume)!r}: only leave_one_out can be resumed")
    anatomy = Anatomy.of(model)
    samples = samples_of(batches, device_of(anatomy.embeddings))
    if not samples and config.score not in NEEDS_NO_TEXT:
        raise InvalidInput(f"score = {config.score!r} needs calibration batches, and got none")
    job = Job(
        anatomy,
        sites_of(anatomy, config.units),
        samples,
        config.seed,
        progress,
        None if resume is None else Path(resume),
    )
    began = time.perf_counter()
    with eval_mode(anatomy.model):
        values = MEASURES[config.score](job)
    cost = Cost(job.forwards, job.backwards, time.perf_counter() - began)
    units = _by_kind(job.sites, values)
    _check_finite(units, config.score)
    return Importance(config.score, units, job.tokens, job.loss, cost)


@dataclass(frozen=True)
class Cost:
    """What a measurement took."""

    forwards: int
    """Forward passes over the calibration text."""
    backwards: int
    seconds: float

    def __str__(self) -> str:
        passes = [_count(self.forwards, "forward pass"), _count(self.backwards, "backward pass")]
        named = [text for n, text in zip((self.forwards, self.backwards), passes, strict=True) if n]
        return ", ".join([*named, f"{self.seconds:.1f} s"])


@dataclass(frozen=True, eq=False)
class Importance:
    """A score for every unit: the higher, the more important."""

    score: Score
    units: Mapping[Kind, Mapping[str, Tensor]]
    """For each kind and site (`Site.key`: the layer, nearly always) a tensor of (units,) scores."""
    tokens: int
    """How many predicted tokens it was measured on."""
    loss: float | None
    """Their mean loss; None if no text was needed."""
    cost: Cost

    def __getitem__(self, unit: tuple[Kind, int] | tuple[Kind, int, int]) -> Tensor:
        """The scores of a layer's units, as `Gates` names them."""
        kind, layer, *block = unit
        key = f"{layer}_{block[0]}" if block and block[0] else str(layer)
        sites = self._sites(kind)
        if key not in sites:
            raise InvalidInput(f"layer {key} has no {kind}{did_you_mean(key, sites)}")
        return sites[key]

    def lowest(self, kind: Kind, share: float, *, uniform: bool = False) -> dict[str, list[int]]:
        """The least important units: for each site, from the lowest upwards.

        `share` is of all units of the kind; with `uniform` it is the same of every site, as a
        smaller stock model needs it.
        """
        if not 0 <= share <= 1:
            raise InvalidInput(f"share = {share!r}: give a number between 0 and 1")
        sites = self._sites(kind)
        if uniform:
            return {
                key: _lowest(values, round(share * len(values))) for key, values in sites.items()
            }
        everything = torch.cat(list(sites.values()))
        at = [(key, unit) for key, values in sites.items() for unit in range(len(values))]
        chosen: dict[str, list[int]] = {key: [] for key in sites}
        for i in _lowest(everything, round(share * len(everything))):
            key, unit = at[i]
            chosen[key].append(unit)
        return chosen

    def _sites(self, kind: Kind) -> Mapping[str, Tensor]:
        if kind not in self.units:
            raise InvalidInput(f"{kind} were not ranked{did_you_mean(kind, self.units)}")
        return self.units[kind]

    def extremes(self, kind: Kind) -> tuple[tuple[str, int], tuple[str, int]]:
        """(site, unit) of the lowest and of the highest score."""
        sites = self._sites(kind)
        ranked = sorted((float(v), key, i) for key, vs in sites.items() for i, v in enumerate(vs))
        return ranked[0][1:], ranked[-1][1:]

    def as_dict(self) -> dict[str, Any]:
        return {
            "score": self.score,
            "tokens": self.tokens,
            "loss": self.loss,
            "cost": asdict(self.cost),
            "units": {
                kind: {key: values.tolist() for key, values in sites.items()}
                for kind, sites in self.units.items()
            },
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """From `as_dict`; other keys are ignored."""
        try:
            units = {
                kind: {k: torch.tensor(v, dtype=torch.float64) for k, v in sites.items()}
                for kind, sites in content["units"].items()
            }
            score, tokens, loss = (content[key] for key in ("score", "tokens", "loss"))
            return cls(score, units, tokens, loss, Cost(**content["cost"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptFile(f"this is no saved importance ({error})") from error

    def __str__(self) -> str:
        findings = "; ".join(self._finding(kind) for kind in self.units)
        text = f" on {self.tokens:,} predicted tokens" if self.tokens else ""
        return f"{self.score}{text} ranks {findings} ({self.cost})"

    def _finding(self, kind: Kind) -> str:
        count = sum(len(values) for values in self.units[kind].values())
        low, high = (
            f"{_unit(kind, *at)} ({float(self.units[kind][at[0]][at[1]]):.2g})"
            for at in self.extremes(kind)
        )
        return f"{count:,} {kind}, from {low} to {high}"


def _by_kind(sites: Iterable[Site], values: Iterable[Tensor]) -> dict[Kind, dict[str, Tensor]]:
    units: dict[Kind, dict[str, Tensor]] = {}
    for site, scores in zip(sites, values, strict=True):
        units.setdefault(site.kind, {})[site.key] = scores
    return units


def _check_finite(units: Mapping[Kind, Mapping[str, Tensor]], score: Score) -> None:
    for kind, site, values in _each(units):
        if not values.isfinite().all():
            raise InvalidInput(
                f"the {score} of the {kind} of layer {site} is not finite: the model's numbers "
                'overflow. Load it with dtype="float32"'
            )


def _each(units: Mapping[Kind, Mapping[str, Tensor]]) -> Iterator[tuple[Kind, str, Tensor]]:
    for kind, sites in units.items():
        for key, values in sites.items():
            yield kind, key, values


def _lowest(values: Tensor, count: int) -> list[int]:
    order: list[int] = values.argsort(stable=True)[:count].tolist()
    return order


def _unit(kind: Kind, site: str, unit: int) -> str:
    layer, _, block = site.partition("_")
    where = f"layer {layer}, block {block}" if block else f"layer {layer}"
    if kind in ("layers", "attention", "mlp"):
        return where
    return f"{kind[:-1]} {unit} of {where}"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}es"
