"""The ladder of scorers: fit and measure each, alone and stacked, then select one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from pliant.errors import InvalidInput
from pliant.routing.fitting.splits import Splits
from pliant.routing.metrics.curves import Ranking
from pliant.routing.metrics.lift import Statistic, aiq_of
from pliant.routing.metrics.ranking import GRID, METRICS, ranks_by_share
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import (
    READS_A_MODEL,
    READS_AN_ENCODER,
    Predictions,
    Scorer,
    make,
    stack,
)
from pliant.stats import Band, Floats, bootstrap_counts

if TYPE_CHECKING:
    from pliant.routing.scorers.vectors import Reader

Progress = Callable[[Sequence[str], str], Iterable[str]]

CONTROLS = ("random", "length", "group")
LADDER = (*CONTROLS, "tfidf", "knn", "text", "embed", "text+embed", "probe", "cpx")
EVERY = (*LADDER, "text+group")
"""With those that few can use."""
# benchmarks/routing_learning.py: with a few hundred labels the scorer that looks best out of fold
# is worse than the one that is best on the average of many label sets.
PREFERRED = ("text+group", "text+embed", "text")
"""What is selected unless another scorer is shown to be better."""
_SURE = 0.99
"""The level of that: several others are compared with it."""
# benchmarks/routing_labels.py, 200 labels: what was "shown" to be better was worse on other
# prompts, by .011 APGR on the mean of MMLU's halves and by .002 on GSM8K's.
_ENOUGH = 400
"""Labels, for one that is not preferred to be selected."""
_TIMED = 50  # prompts, one at a time


@dataclass(frozen=True, eq=False)
class Rung:
    """A fitted scorer, and what its out-of-fold predictions are worth."""

    kind: str
    scorer: Scorer
    predictions: Predictions
    """Out of fold: of fits that had not seen the prompt."""
    value: Band
    """APGR, or AIQ: see `value_of`."""
    fit_seconds: float
    ms: float
    """The median of one decision."""
    size: int
    """Bytes on disk."""
    behind: Band | None = None
    """The distance of the net value to the best one's, paired; None for the best itself."""
    net: Band | None = None
    """The value at equal cost, scoring counted; None where scoring costs nothing."""
    cost: float = 0.0
    """Of scoring a prompt, in the unit of the labels; 0 where it cannot be counted in that."""
    scoring: Floats | None = None
    """(m,) the same by the model that answers: one that continues from it pays nothing."""

    @property
    def gain(self) -> Floats:
        """(n, m) out of fold."""
        return self.predictions.gain

    @property
    def worth(self) -> float:
        """What the scorers are ordered by."""
        return (self.net or self.value).value

    def as_dict(self) -> dict[str, Any]:
        return {
            "scorer": self.kind,
            "value": self.value.as_dict(),
            "net": (self.net or self.value).as_dict(),
            "behind": None if self.behind is None else self.behind.as_dict(),
            "fit_seconds": self.fit_seconds,
            "ms": self.ms,
            "cost": self.cost,
            "bytes": self.size,
            "chosen": self.scorer.chosen(),
        }


def climb(
    splits: Splits,
    kinds: Sequence[str],
    base: str | None,
    seed: int,
    progress: Progress = lambda items, _: items,
    local: Mapping[str, str] | None = None,
    groups_known: bool = False,
    encoder: str | Reader | None = None,
) -> list[Rung]:
    """Fit every scorer, and a stack of the best; compare them out of fold, the best first.

    `local` names, for each model that runs on this machine, what it was loaded from: an answer of
    the model that a scorer reads may continue from its prefill.
    """
    rungs: list[Rung] = []
    readers: dict[str, Any] = dict.fromkeys(READS_A_MODEL, base)
    if any(kind in READS_AN_ENCODER for kind in kinds):
        from pliant.routing.scorers.embed import default_encoder, reader_of

        # One reader, so that each prompt is embedded once.
        encoder = encoder or default_encoder()
        reader = reader_of(encoder) if isinstance(encoder, str) else encoder
        readers |= dict.fromkeys(READS_AN_ENCODER, reader)
    for kind in progress(kinds, "fitting"):
        scorer = make(kind, base=readers[kind]) if kind in readers else make(kind)
        begun = time.perf_counter()
        predictions = out_of_fold(scorer, splits, seed)
        predictions.check(splits.learn, kind)
        fitted_as_saved(scorer, splits.train, seed)
        seconds = time.perf_counter() - begun
        rungs.append(_rung(scorer, predictions, seconds, splits.learn, local or {}))
    stacked = _stack(eligible(rungs, groups_known), splits, local or {})
    rungs += [] if stacked is None else [stacked]
    best = max(rungs, key=lambda rung: rung.worth)
    return [
        rung if rung is best else _compared(rung, best, splits.learn)
        for rung in sorted(rungs, key=lambda rung: rung.worth, reverse=True)
    ]


def out_of_fold(scorer: Scorer, splits: Splits, seed: int) -> Predictions:
    """Of `learn`: of the rows beyond it, which only train, there are no predictions to use.

    Their missing grades are predicted from the grades of `learn`. For the settings of the scorer
    that is done once; what it is compared and calibrated by must not come from a row's own grade.
    """
    table, partitions = splits.train, splits.train_partitions
    predictions = scorer.cross_validate(table, partitions, seed)
    if splits.incomplete is not None:
        predictions = scorer.out_of_fold(table, partitions, splits.train_on, seed)
    return predictions.select(slice(len(splits.learn)))


def _stack(rungs: Sequence[Rung], splits: Splits, local: Mapping[str, str]) -> Rung | None:
    """The stack of those that improve on the best one together; None if none does."""
    if len(rungs) < 2:
        return None
    begun = time.perf_counter()
    right, folds = splits.learn.right, splits.partitions[0]
    each = {rung.kind: rung.predictions for rung in rungs}
    best = max(rungs, key=lambda rung: rung.worth).kind
    first = next((kind for kind in PREFERRED if kind in each), best)
    names = stack.chosen_members(each, first, right, folds)
    if len(names) == 1:
        return None
    members = [rung.scorer for name in names for rung in rungs if rung.kind == name]
    predictions = [each[name] for name in names]
    scorer = stack.Stack(members, stack.Mixture.fit(predictions, right))
    of_fold = stack.out_of_fold(predictions, right, folds)
    return _rung(scorer, of_fold, time.perf_counter() - begun, splits.learn, local)


def continued_by(scorer: Scorer, local: Mapping[str, str]) -> str | None:
    """The model whose answer continues from this scorer's prefill, if there is one."""
    reads = [m for m in getattr(scorer, "members", [scorer]) if hasattr(m, "while_answering")]
    if len(reads) != 1:
        return None
    base = reads[0].chosen().get("base")
    return next((name for name, source in local.items() if source == base), None)


def select(rungs: Sequence[Rung], outcomes: Outcomes, groups_known: bool = False) -> Rung:
    """The preferred scorer, or the best of those that are shown to be better.

    With a few hundred labels the scorer that looks best is so by chance. So one of `PREFERRED`, the
    first that may be selected, stays unless the paired interval of another's distance to it lies
    above 0, at equal cost (`value_of`), on the `outcomes` that the predictions are of; of these
    there must be _ENOUGH. `random` is never selected, nor a scorer that needs a prompt's group
    unless `groups_known`.
    """
    fit = eligible(rungs, groups_known)
    if not fit:
        raise InvalidInput("none of these scorers can be selected: add text or cpx")
    order = [rung for kind in PREFERRED for rung in fit if rung.kind == kind]
    if not order:
        return max(fit, key=lambda rung: rung.worth)
    stays = order[0]
    for rung in order[1:]:  # an encoder may cost more than it is worth
        if gap(rung, stays, outcomes, _SURE).low > 0:
            stays = rung
    if len(outcomes) < _ENOUGH:
        return stays
    better = [r for r in fit if r is not stays and gap(r, stays, outcomes, _SURE).low > 0]
    return max(better or [stays], key=lambda rung: rung.worth)


def eligible(rungs: Sequence[Rung], groups_known: bool = False) -> list[Rung]:
    """Those that may be selected."""
    fit = [r for r in rungs if r.kind != "random" and r.scorer.saveable]
    return [r for r in fit if groups_known or not r.scorer.needs_groups]


def value_of(gain: Floats, outcomes: Outcomes, scoring: Floats | None = None) -> Band:
    """APGR where it is defined (`apgr_defined`), else AIQ (metrics/lift.py).

    With the cost of `scoring` (m,), by the model that answers, it is the same at equal cost: what
    scoring costs is lost for calls to the stronger models.
    """
    return _band(_worth(gain, outcomes, scoring), outcomes)


def gap(a: Rung, b: Rung, outcomes: Outcomes, level: float = 0.95) -> Band:
    """How much more a is worth than b, on the same resamples."""
    of_a, of_b = (_worth(rung.gain, outcomes, rung.scoring) for rung in (a, b))
    return _band(lambda counts: of_a(counts) - of_b(counts), outcomes, level)


def apgr_defined(outcomes: Outcomes) -> bool:
    """Whether there are two models at two prices, the second of which is right more often."""
    return ranks_by_share(outcomes) and float(outcomes.gain.mean()) > 1e-12


def _worth(gain: Floats, outcomes: Outcomes, scoring: Floats | None) -> Statistic:
    """A statistic of counts: the value at equal cost."""
    paid = np.zeros(len(outcomes.models)) if scoring is None else scoring
    if not apgr_defined(outcomes):
        return aiq_of(gain, outcomes, None, paid)
    ranking = Ranking.of(gain[:, -1], outcomes)
    start, slope = _budgets(ranking, paid)
    if (start, slope) == (0, 1):
        return lambda counts: METRICS["apgr"](ranking, counts)
    return partial(_net_apgr, ranking, start=start, slope=slope)


def _budgets(ranking: Ranking, paid: Floats) -> tuple[float, float]:
    """Start and slope: with a share x of strong calls, `start + slope * x` of the difference
    between all weak and all strong is spent, scoring counted."""
    extra = float(ranking.extra.mean())
    if extra <= 0:  # the strong model costs no more: nothing is lost for calls
        return 0.0, 1.0
    return float(paid[0]) / extra, 1 + float(paid[1] - paid[0]) / extra


def _net_apgr(ranking: Ranking, counts: Floats, start: float, slope: float) -> Floats:
    """The mean share of the difference that is recovered, over budgets from all weak to all strong.

    Budgets too small for scoring recover nothing.
    """
    whole = ranking.gained(counts)[:, -1] / counts.sum(axis=1)
    if start >= 1:  # scoring costs all that could be saved
        return np.where(whole > 1e-12, 0.0, np.nan)
    at = np.linspace(0, min(1.0, (1 - start) / slope), GRID + 1)
    quality, _ = ranking.curve(counts, at)
    mean = slope * np.asarray(np.trapezoid(quality - quality[:, :1], at, axis=1))
    return np.divide(mean, whole, out=np.full_like(mean, np.nan), where=whole > 1e-12)


def fitted_as_saved(scorer: Scorer, train: Outcomes, seed: int = 0) -> Scorer:
    """The scorer in the precision of its files, so that what is measured is what will route."""
    scorer.fit(train, None, seed)
    if scorer.saveable:
        scorer.load_state(scorer.state())
    return scorer


def _band(measure: Statistic, outcomes: Outcomes, level: float = 0.95) -> Band:
    resamples = 1000 if apgr_defined(outcomes) else 200
    n, clusters = len(outcomes), outcomes.questions
    return bootstrap_counts(measure, n, resamples=resamples, level=level, clusters=clusters)


def _rung(
    scorer: Scorer,
    predictions: Predictions,
    seconds: float,
    outcomes: Outcomes,
    local: Mapping[str, str],
) -> Rung:
    gain, ms = predictions.gain, decision_ms(scorer, outcomes)
    cost, continues = scoring_cost(scorer, ms, outcomes), continued_by(scorer, local)
    scoring = np.array([0.0 if name == continues else cost for name in outcomes.models])
    value = value_of(gain, outcomes)
    net = value_of(gain, outcomes, scoring) if cost else None
    size = size_of(scorer)
    return Rung(
        scorer.kind, scorer, predictions, value, seconds, ms, size, None, net, cost, scoring
    )


def scoring_cost(scorer: Scorer, ms: float, outcomes: Outcomes) -> float:
    """Of one prompt, in the labels' unit; reading a local model costs no money and no tokens."""
    if outcomes.unit == "ms":
        return ms
    return scorer.flops(outcomes.asked) if outcomes.unit == "flops" else 0.0


def _compared(rung: Rung, best: Rung, outcomes: Outcomes) -> Rung:
    return replace(rung, behind=gap(rung, best, outcomes))


def decision_ms(scorer: Scorer, outcomes: Outcomes) -> float:
    """The median time of one decision, prompts one at a time, each read anew."""
    seconds, asked = [], outcomes.asked
    with ExitStack() as paused:
        for member in getattr(scorer, "members", [scorer]):
            if (reader := getattr(member, "reader", None)) is not None:
                paused.enter_context(reader.forgetful())
        for i in range(min(_TIMED, len(outcomes))):
            groups = None if outcomes.groups is None else [outcomes.groups[i]]
            begun = time.perf_counter()
            scorer.predict([asked[i]], groups)
            seconds.append(time.perf_counter() - begun)
    return 1000 * float(np.median(seconds))


def size_of(scorer: Scorer) -> int:
    """The scorer's bytes on disk."""
    with TemporaryDirectory() as folder:
        scorer.save(Path(folder))
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
