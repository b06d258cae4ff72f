"""Measure a router on held-out prompts: its curve, its threshold, its probabilities.

evaluation = evaluate("my-router", Outcomes.read("test.jsonl"))
print(evaluation.metrics["apgr"], evaluation.routed.share)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pliant.errors import InvalidInput
from pliant.routing import router_file, scorers
from pliant.routing.decision_rule import Chosen
from pliant.routing.fitting.assignment import assigned
from pliant.routing.fitting.evaluation import (
    SIDES,
    CostLine,
    Evaluation,
    Example,
    GroupResult,
    Histogram,
    Paraphrases,
    Reliability,
    Routed,
)
from pliant.routing.fitting.splits import fitted_on
from pliant.routing.fitting.verdict import Verdict
from pliant.routing.goals.goal import Goal
from pliant.routing.metrics import calibration as calibrations
from pliant.routing.metrics.curves import LambdaCurve, lambda_curve, quality_cost_curve
from pliant.routing.metrics.ranking import Report, ahead, report
from pliant.routing.outcomes import Outcomes
from pliant.routing.router_file import RouterFile
from pliant.routing.scorers import READS_A_MODEL, Predictions
from pliant.stats import Band, Floats, bootstrap_counts, brier, brier_skill, ece

BASELINES = "baselines"
"""The folder of the scorers that an evaluation compares with, inside the fit's."""
_BINS, _SHOWN = 10, 5


def evaluate(router: str | Path, outcomes: Outcomes, device: str | None = None) -> Evaluation:
    """Measure a saved router beside its baselines; a model that its scorer reads runs on `device`.

    Prompts that it was fitted on are left out and counted, and so are those that not every one of
    its models was asked.
    """
    folder = Path(router).expanduser()
    file, scorer = router_file.open_router(folder, device)
    outcomes, fitted = outcomes.of_models(file.names), file.fit_folder(folder)
    file.check_unit(outcomes.unit)
    known = fitted_on(fitted, outcomes.prompts)
    if known.all():
        raise InvalidInput(
            f"the router was fitted on all {len(known):,} of these prompts: it can only be "
            "measured on others"
        )
    held = outcomes.select(~known).shared()
    kinds = sorted(path.name for path in (fitted / BASELINES).glob("*") if path.is_dir())
    baselines = {
        kind: scorers.load(fitted / BASELINES / kind).predict(held.asked, held.groups)
        for kind in kinds
        if held.groups is not None or kind != "group"
    }
    predictions = scorer.predict(held.asked, held.groups)
    incomplete = len(known) - int(known.sum()) - len(held)
    return measure(file, predictions, held, baselines, int(known.sum()), incomplete, scorer.kinds)


def measure(
    file: RouterFile,
    predictions: Predictions,
    outcomes: Outcomes,
    baselines: Mapping[str, Predictions],
    left_out: int = 0,
    incomplete: int = 0,
    kinds: Sequence[str] | None = None,
) -> Evaluation:
    """All of it, from predictions; the wordings of a question are drawn together for the bands.

    `kinds` are those of the scorers that predict, by default the one that the file names.
    """
    chosen = file.rule.choose(predictions.gain, predictions.novel)
    right = calibrated(file, predictions)
    gain, score = predictions.last_gain, None if right is None else 1 - right[:, 0]
    columns = () if right is None else zip(outcomes.models, right.T, outcomes.right.T, strict=True)
    routed = _routed(chosen, outcomes, np.array(file.scoring))
    return Evaluation(
        scorer=file.scorer.kind,
        report=_with_scoring(file, predictions, outcomes, score),
        baselines={
            kind: report(each.gain, outcomes, prices=file.costs) for kind, each in baselines.items()
        },
        over={
            kind: ahead(predictions.gain, each.gain, outcomes, file.costs)
            for kind, each in baselines.items()
        },
        routed=routed,
        threshold=file.threshold.limit,
        calibration=tuple(reliability(model, p, y) for model, p, y in columns),
        histogram=None if score is None else _histogram(score, outcomes),
        examples=_examples(gain, score, chosen, outcomes),
        novel=None if predictions.novel is None else float(predictions.novel.mean()),
        left_out=left_out,
        incomplete=incomplete,
        paraphrases=_paraphrases(outcomes.questions or (), gain, chosen),
        groups=_groups(outcomes, chosen),
        costs=dict(zip(outcomes.models, outcomes.cost.mean(axis=0).tolist(), strict=True)),
        qualities=dict(zip(outcomes.models, outcomes.right.mean(axis=0).tolist(), strict=True)),
        verdict=_verdict(
            file, routed, chosen, outcomes, baselines.get("group"), kinds or (file.scorer.kind,)
        ),
        **_lines(file, predictions, outcomes),
    )


def verdict(
    file: RouterFile, predictions: Predictions, outcomes: Outcomes, kinds: Sequence[str]
) -> Verdict:
    """Whether the router pays on these prompts, without all else that `measure` finds; `kinds` are
    those of the scorers that predict."""
    chosen = file.rule.choose(predictions.gain, predictions.novel)
    routed = _routed(chosen, outcomes, np.array(file.scoring))
    return _verdict(file, routed, chosen, outcomes, None, kinds)


def calibrated(file: RouterFile, predictions: Predictions) -> Floats | None:
    """(n, m) P(right) as the router states it."""
    if predictions.right is None:
        return None
    right = predictions.right.copy()
    for j, name in enumerate(file.names):
        content = (file.calibration or {}).get(name)
        if content is not None:
            right[:, j] = calibrations.from_json(content).apply(right[:, j])
    return right


def reliability(model: str, p: Floats, y: Floats) -> Reliability:
    """How well a probability is calibrated."""
    p = np.clip(p, 0.0, 1.0)
    constant = np.full_like(y, y.mean())
    skill = brier_skill(p, y)
    bins = tuple(
        (float(p[at].mean()), float(y[at].mean()), len(at))
        for at in np.array_split(np.argsort(p, kind="stable"), min(_BINS, len(p)))
    )
    return Reliability(
        model,
        ece(p, y),
        ece(constant, y),
        brier(p, y),
        brier(constant, y),
        float(skill) if np.isfinite(skill) else None,
        bins,
    )


def _routed(chosen: Chosen, outcomes: Outcomes, scoring: Floats) -> Routed:
    right, cost = outcomes.routed(chosen)
    cost, one = cost + scoring[chosen], np.ones(len(outcomes))

    def ratio(of: Floats, total: Floats) -> Band:
        return bootstrap_counts(
            lambda c: (c @ of) / np.maximum(c @ total, 1e-12), len(of), clusters=outcomes.questions
        )

    return Routed(
        dict(zip(outcomes.models, outcomes.shares(chosen).tolist(), strict=True)),
        ratio(right, one),
        ratio(right, outcomes.strong),
        ratio(cost, one),
        ratio(cost, outcomes.cost[:, -1]),
    )


def _verdict(
    file: RouterFile,
    routed: Routed,
    chosen: Chosen,
    outcomes: Outcomes,
    by_group: Predictions | None,
    kinds: Sequence[str],
) -> Verdict:
    """Also beside the best assignment of groups to models, where there are groups to assign."""
    shares, right = outcomes.shares(chosen), outcomes.routed(chosen)[0]

    def over(control: Floats) -> Band:
        return bootstrap_counts(
            lambda c: (c @ (right - control)) / c.sum(axis=1),
            len(right),
            clusters=outcomes.questions,
        )

    over_groups = None
    if by_group is not None and len(set(outcomes.groups or ())) > 1:
        over_groups = over(assigned(by_group, outcomes, routed.cost.value, file.costs))
    costs, quality = outcomes.cost.mean(axis=0), outcomes.right.mean(axis=0)
    cheapest = int(np.lexsort((-quality, costs))[0])
    strongest = max(float(quality[-1]), 1e-12)
    goal = Goal.of_sentence(file.threshold.sentence)
    return Verdict(
        strongest=outcomes.models[-1],
        cost=routed.cost.value,
        strongest_cost=float(costs[-1]),
        unit=outcomes.unit,
        of_quality=routed.of_strong,
        over_random=over(outcomes.right @ shares),
        over_strongest=over(outcomes.strong),
        over_groups=over_groups,
        same_price=outcomes.same_price,
        scoring=float(shares @ np.array(file.scoring)),
        scoring_ms=file.scorer.ms,
        shares=tuple(shares.tolist()),
        reads_model=any(kind in READS_A_MODEL for kind in kinds),
        cheapest=outcomes.models[cheapest],
        cheapest_cost=float(costs[cheapest]),
        cheapest_of_quality=float(quality[cheapest]) / strongest,
        goal_of_quality=None if goal is None else goal.share_of_quality(strongest),
    )


def _with_scoring(
    file: RouterFile, predictions: Predictions, outcomes: Outcomes, score: Floats | None
) -> Report:
    """The report, with the curve of the router itself: every prompt is scored, and novel ones go
    to the default. So the router's own point lies on it."""
    measured = report(predictions.gain, outcomes, score, file.costs)
    curve = measured.curve
    novel, ends = predictions.novel, (0, len(file.models) - 1)
    if novel is not None and novel.any() and file.novel_to in ends:
        apart = np.abs(predictions.last_gain).max(initial=0.0) + 1
        place = apart if file.novel_to else -apart
        gain = np.where(novel, place, predictions.last_gain)
        curve = quality_cost_curve(gain, outcomes)
    first, *_, last = file.scoring
    scoring = first + (last - first) * curve.share
    return replace(measured, curve=replace(curve, cost=curve.cost + scoring))


def _histogram(score: Floats, outcomes: Outcomes) -> Histogram:
    edges = np.linspace(0, 1, 21)
    right, wrong = (
        tuple(np.histogram(score, edges, weights=weights)[0].tolist())
        for weights in (outcomes.weak, 1 - outcomes.weak)
    )
    return Histogram(tuple(edges.tolist()), outcomes.models[0], right, wrong)


def _examples(
    gain: Floats, score: Floats | None, chosen: Chosen, outcomes: Outcomes
) -> dict[str, tuple[Example, ...]]:
    """On both sides of the threshold: the surest, and those that just fell on their side."""
    order = np.argsort(gain, kind="stable")
    stays, goes = (order[chosen[order] == j] for j in (0, len(outcomes.models) - 1))

    def example(i: int) -> Example:
        return Example(
            outcomes.prompts[i],
            float(gain[i]),
            outcomes.models[int(chosen[i])],
            dict(zip(outcomes.models, outcomes.right[i].tolist(), strict=True)),
            None if score is None else float(score[i]),
        )

    sides = (stays[:_SHOWN], stays[-_SHOWN:][::-1], goes[:_SHOWN], goes[-_SHOWN:][::-1])
    return {side: tuple(map(example, at)) for side, at in zip(SIDES, sides, strict=True)}


def _paraphrases(questions: Sequence[str], gain: Floats, chosen: Chosen) -> Paraphrases | None:
    rows: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        rows.setdefault(question, []).append(i)
    several = [at for at in rows.values() if len(at) > 1]
    if not several:
        return None
    same = [len(set(chosen[at].tolist())) == 1 for at in several]
    spread = [float(np.ptp(gain[at])) for at in several]
    return Paraphrases(len(several), float(np.mean(same)), float(np.mean(spread)))


def _groups(outcomes: Outcomes, chosen: Chosen) -> tuple[GroupResult, ...]:
    if outcomes.groups is None:
        return ()
    routed, strong = outcomes.routed(chosen)[0], len(outcomes.models) - 1
    names = np.array(outcomes.groups)

    def group(name: str) -> GroupResult:
        rows = names == name
        columns = (outcomes.weak, outcomes.strong, routed, chosen == strong)
        less = (outcomes.strong - routed)[rows]
        lost = bootstrap_counts(lambda counts: (counts @ less) / counts.sum(-1), len(less))
        weak, large, ours, share = (float(of[rows].mean()) for of in columns)
        right = outcomes.right[rows].mean(axis=0).tolist()
        alone = dict(zip(outcomes.models, right, strict=True))
        return GroupResult(name, len(less), weak, large, ours, share, lost, alone)

    return tuple(group(name) for name in sorted(set(outcomes.groups)))


def _lines(
    file: RouterFile, predictions: Predictions, outcomes: Outcomes
) -> dict[str, CostLine | None]:
    """Perfect routing and, of more than two models, the router's own as the price of cost goes up.

    Of two models perfect routing goes by the share of calls, of more by the price of cost.
    """
    perfect = outcomes.right - outcomes.right[:, :1]
    if len(file.models) == 2:
        curve = quality_cost_curve(perfect[:, -1], outcomes, resamples=1)
        return {"perfect": CostLine(tuple(curve.cost.tolist()), tuple(curve.quality.tolist()))}
    gain, novel = predictions.gain, predictions.novel
    own = lambda_curve(gain, outcomes, file.costs, novel=novel, novel_to=file.novel_to)
    by_price = _line(own, own.shares @ np.array(file.scoring))
    return {"perfect": _line(lambda_curve(perfect, outcomes, file.costs)), "by_price": by_price}


def _line(curve: LambdaCurve, scoring: Floats | float = 0.0) -> CostLine:
    cost = curve.cost + scoring
    order = np.argsort(cost, kind="stable")
    return CostLine(tuple(cost[order].tolist()), tuple(curve.quality[order].tolist()))
