"""A router on prompts that it has not seen: its curve, its promises, its probabilities.

found = evaluate("my-router", Outcomes.read("test.jsonl"))
print(found.metrics["apgr"], found.routed.share)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pliant.errors import InvalidInput
from pliant.routing import router_file, scorers
from pliant.routing.fitting import training_hashes
from pliant.routing.metrics import calibration as calibrations
from pliant.routing.metrics.ranking import Report, difference, report
from pliant.routing.open import open_scorer
from pliant.routing.outcomes import Outcomes
from pliant.routing.router_file import RouterFile
from pliant.routing.scorers import Predictions
from pliant.stats import Band, bootstrap_counts, brier, brier_skill, ece

Floats = NDArray[np.float64]
BASELINES = "baselines"
_BINS, _SHOWN = 10, 5


@dataclass(frozen=True, eq=False)
class Routed:
    """What the router's threshold does with these prompts."""

    shares: dict[str, float]
    """Of calls, by model."""
    quality: Band
    of_strong: Band
    """The quality as a share of the strongest model's."""
    cost: Band
    """Of a prompt, scoring counted in full (an answer that goes on from it saves it again)."""
    of_strong_cost: Band
    """The cost as a share of always asking the strongest."""

    @property
    def share(self) -> float:
        """Of calls to the strongest model."""
        return list(self.shares.values())[-1]

    def as_dict(self) -> dict[str, Any]:
        bands = ("quality", "of_strong", "cost", "of_strong_cost")
        return {"shares": self.shares} | {name: getattr(self, name).as_dict() for name in bands}


@dataclass(frozen=True)
class Kept:
    """How well P(a model is right) is kept, after calibration; and what a constant would get."""

    model: str
    ece: float
    ece_constant: float
    brier: float
    brier_constant: float
    skill: float | None
    """1 - Brier / the constant's."""
    bins: tuple[tuple[float, float, int], ...]
    """(mean prediction, share right, prompts) of bins of equal size."""


@dataclass(frozen=True)
class Example:
    """A prompt, what was predicted and what was so."""

    prompt: str
    gain: float
    chosen: str
    right: dict[str, float]


@dataclass(frozen=True)
class Paraphrases:
    """Whether the same question in other words goes to the same model."""

    questions: int
    same_model: float
    """The share of questions all of whose wordings go to one model."""
    spread: float
    """The mean, over questions, of the range of the predicted gain."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Everything that is measured on one set of prompts."""

    scorer: str
    report: Report
    baselines: Mapping[str, Report]
    over: Mapping[str, Band]
    """The router's APGR less each baseline's, paired."""
    routed: Routed
    threshold: float
    calibration: tuple[Kept, ...]
    histogram: dict[str, Any]
    """Scores by whether the cheapest model was right."""
    examples: dict[str, list[Example]]
    """The nearest to the threshold on both sides, and the farthest from it."""
    novel: float | None
    """The share of prompts that are unlike those that the router was made on."""
    left_out: int = 0
    """Prompts that the router was made on: not counted in anything above."""
    paraphrases: Paraphrases | None = None

    @property
    def metrics(self) -> Mapping[str, Band]:
        return self.report.metrics

    def as_dict(self) -> dict[str, Any]:
        return {
            "scorer": self.scorer,
            **self.report.as_dict(),
            "baselines": {name: found.as_dict() for name, found in self.baselines.items()},
            "over": {name: found.as_dict() for name, found in self.over.items()},
            "routed": self.routed.as_dict(),
            "threshold": self.threshold if np.isfinite(self.threshold) else str(self.threshold),
            "calibration": [asdict(kept) for kept in self.calibration],
            "histogram": self.histogram,
            "examples": {
                side: [asdict(example) for example in some] for side, some in self.examples.items()
            },
            "novel": self.novel,
            "left_out": self.left_out,
            "paraphrases": None if self.paraphrases is None else asdict(self.paraphrases),
        }


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The prompts of a label table that a router was not made on, each scored once."""

    folder: Path
    file: RouterFile
    outcomes: Outcomes
    predicted: Predictions
    left_out: int
    """Prompts that the router was made on."""


def held_out(router: str | Path, outcomes: Outcomes) -> HeldOut:
    """Leave out what a saved router was made on, and let it score the rest."""
    folder = Path(router).expanduser()
    file = router_file.read(folder)
    scorer = open_scorer(folder, file)
    outcomes = outcomes.of_models(file.names)
    known = training_hashes.among(folder, outcomes.prompts)
    if known.all():
        raise InvalidInput(
            f"the router was made on all {len(known):,} of these prompts: it can only be measured "
            "on others"
        )
    held = outcomes.select(~known)
    return HeldOut(folder, file, held, scorer.predict(held.asked, held.groups), int(known.sum()))


def evaluate(router: str | Path, outcomes: Outcomes) -> Evaluation:
    """Measure a saved router. Prompts that it was made on are left out, and counted."""
    return evaluation(held_out(router, outcomes))


def evaluation(held: HeldOut) -> Evaluation:
    """All that is measured on prompts that are scored already, beside the router's baselines."""
    kinds = sorted(path.name for path in (held.folder / BASELINES).glob("*") if path.is_dir())
    rest = {
        kind: scorers.load(held.folder / BASELINES / kind).predict(
            held.outcomes.asked, held.outcomes.groups
        )
        for kind in kinds
        if held.outcomes.groups is not None or kind != "group"
    }
    return measured(held.file, held.predicted, held.outcomes, rest, held.left_out)


def measured(
    file: RouterFile,
    predicted: Predictions,
    outcomes: Outcomes,
    baselines: Mapping[str, Predictions],
    left_out: int = 0,
) -> Evaluation:
    """All of it, from predictions; wordings of one question are drawn together for the bands."""
    chosen = file.rule.choose(predicted.gain, predicted.novel)
    right = calibrated(file, predicted)
    gain, score = predicted.last_gain, None if right is None else 1 - right[:, 0]
    return Evaluation(
        scorer=file.scorer.kind,
        report=report(gain, outcomes, score),
        baselines={kind: report(said.last_gain, outcomes) for kind, said in baselines.items()},
        over={
            kind: difference("apgr", gain, said.last_gain, outcomes)
            for kind, said in baselines.items()
        },
        routed=_routed(chosen, outcomes, file.scorer.cost),
        threshold=file.threshold.limit,
        calibration=() if right is None else _kept(right, outcomes),
        histogram={} if score is None else _histogram(score, outcomes),
        examples=_examples(file, gain, chosen, outcomes),
        novel=None if predicted.novel is None else float(predicted.novel.mean()),
        left_out=left_out,
        paraphrases=_paraphrases(outcomes.questions or (), gain, chosen),
    )


def calibrated(file: RouterFile, predicted: Predictions) -> Floats | None:
    """(n, m) P(right) as the router states it."""
    if predicted.right is None:
        return None
    found = predicted.right.copy()
    for j, name in enumerate(file.names):
        content = (file.calibration or {}).get(name)
        if content is not None:
            found[:, j] = calibrations.from_json(content).apply(found[:, j])
    return found


def _routed(chosen: NDArray[np.int64], outcomes: Outcomes, scoring: float) -> Routed:
    rows = np.arange(len(outcomes))
    right, cost = outcomes.right[rows, chosen], outcomes.cost[rows, chosen] + scoring

    def mean(of: Floats) -> Band:
        return bootstrap_counts(
            lambda counts: counts @ of / counts.sum(axis=1), len(of), clusters=outcomes.questions
        )

    def share(of: Floats, whole: Floats) -> Band:
        return bootstrap_counts(
            lambda c: (c @ of) / np.maximum(c @ whole, 1e-12), len(of), clusters=outcomes.questions
        )

    calls = np.bincount(chosen, minlength=len(outcomes.models)) / len(outcomes)
    return Routed(
        dict(zip(outcomes.models, calls.tolist(), strict=True)),
        mean(right),
        share(right, outcomes.strong),
        mean(cost),
        share(cost, outcomes.cost[:, -1]),
    )


def _kept(right: Floats, outcomes: Outcomes) -> tuple[Kept, ...]:
    return tuple(
        kept(name, right[:, j], outcomes.right[:, j]) for j, name in enumerate(outcomes.models)
    )


def kept(name: str, p: Floats, y: Floats) -> Kept:
    """How well a probability is kept."""
    p = np.clip(p, 0.0, 1.0)
    constant = np.full_like(y, y.mean())
    skill = brier_skill(p, y)
    bins = tuple(
        (float(p[at].mean()), float(y[at].mean()), len(at))
        for at in np.array_split(np.argsort(p, kind="stable"), min(_BINS, len(p)))
    )
    return Kept(
        name,
        ece(p, y),
        ece(constant, y),
        brier(p, y),
        brier(constant, y),
        float(skill) if np.isfinite(skill) else None,
        bins,
    )


def _histogram(score: Floats, outcomes: Outcomes) -> dict[str, Any]:
    edges = np.linspace(0, 1, 21)
    counts = {
        "right": np.histogram(score, edges, weights=outcomes.weak)[0].tolist(),
        "wrong": np.histogram(score, edges, weights=1 - outcomes.weak)[0].tolist(),
    }
    return {"edges": edges.tolist(), "model": outcomes.models[0], **counts}


def _examples(
    file: RouterFile, gain: Floats, chosen: NDArray[np.int64], outcomes: Outcomes
) -> dict[str, list[Example]]:
    """On both sides of the threshold: the surest, and those that just fell on their side."""
    order = np.argsort(gain, kind="stable")
    stays = [i for i in order if chosen[i] == 0]
    goes = [i for i in order if chosen[i] == len(outcomes.models) - 1]

    def shown(rows: list[Any]) -> list[Example]:
        return [
            Example(
                outcomes.prompts[i],
                float(gain[i]),
                file.names[int(chosen[i])],
                dict(zip(outcomes.models, outcomes.right[i].tolist(), strict=True)),
            )
            for i in rows
        ]

    return {
        "surely cheap": shown(stays[:_SHOWN]),
        "just cheap": shown(stays[-_SHOWN:][::-1]),
        "just dear": shown(goes[:_SHOWN]),
        "surely dear": shown(goes[-_SHOWN:][::-1]),
    }


def _paraphrases(
    questions: Sequence[str], gain: Floats, chosen: NDArray[np.int64]
) -> Paraphrases | None:
    rows: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        rows.setdefault(question, []).append(i)
    several = [at for at in rows.values() if len(at) > 1]
    if not several:
        return None
    same = [len(set(chosen[at].tolist())) == 1 for at in several]
    spread = [float(np.ptp(gain[at])) for at in several]
    return Paraphrases(len(several), float(np.mean(same)), float(np.mean(spread)))
