"""A report as the sections of one page: sentences, pictures and tables."""

from __future__ import annotations

import math
from typing import Literal

from pliant.cli.route import tables
from pliant.cli.route.report_data import Measured, ReportData
from pliant.cli.route.tables import brief
from pliant.reports import plots
from pliant.reports.page import KeyFigure, Section, Top, Verdict
from pliant.reports.palette import Role
from pliant.reports.plots import Line, Roles
from pliant.reports.tables import count
from pliant.routing.fitting.evaluation import CostLine, Evaluation
from pliant.routing.metrics.curves import Curve
from pliant.routing.units import amount, percent, same_price
from pliant.stats import Band

MEASURE_IT = (
    "Nothing is measured here: the folder holds no evaluation. Give labels of prompts that the "
    "router was not fitted on, as in --labels test.jsonl."
)
_OUTDATED = (
    "The threshold has changed since this was measured, so its point, its probabilities and its "
    "examples are left out: --labels measures the router as it is now."
)


def sections(data: ReportData) -> list[Section]:
    measured = data.measured
    shown = [_quality_against_cost(data)]
    if measured is not None:
        shown.append(_figures(data, measured))
        if not measured.outdated:
            shown += [*_groups(data, measured), *_examples(data, measured)]
            shown += _probabilities(measured)
    if data.ladder:
        tried = tables.ladder(data.ladder, data.file.names, data.file.scorer.kind)
        shown.append(Section("How the scorer was chosen", tables=[tried]))
    return [*shown, _labels(data), _ledger(data)]


def title(data: ReportData) -> str:
    names = ", ".join(data.file.names[:-1])
    return f"{data.folder.resolve().name}: a router between {names} and {data.strong}"


# --- the verdict and its figures ---------------------------------------------------------------


def top(data: ReportData) -> Top:
    """Quality, cost, what is escalated and what scoring adds; and whether that pays."""
    verdict = _verdict(data)
    if data.measured is None or data.measured.outdated:
        return Top(verdict)
    evaluation, scorer = data.measured.evaluation, data.file.scorer
    routed, strong = evaluation.routed, brief(data.strong)
    if evaluation.same_price:
        return Top(verdict, _answers(data, evaluation))
    overhead = scorer.cost / evaluation.strong_cost if evaluation.strong_cost else 0.0
    time = "" if scorer.ms is None else f", {scorer.ms:.3g} ms"
    figures = (
        KeyFigure("quality", percent(routed.of_strong.value), _of(routed.of_strong, strong)),
        KeyFigure("cost", percent(routed.of_strong_cost.value), f"of always asking {strong}"),
        KeyFigure("escalated", percent(routed.share), f"of calls go to {strong}"),
        KeyFigure("overhead", percent(overhead), f"of {strong}'s cost for scoring{time}"),
    )
    return Top(verdict, figures)


def _answers(data: ReportData, evaluation: Evaluation) -> tuple[KeyFigure, ...]:
    """Where every model costs the same: what is right more often, instead of what is saved."""
    routed, verdict = evaluation.routed, evaluation.verdict
    over = None if verdict is None else verdict.over_strongest
    first, *others = sorted(routed.shares.items(), key=lambda share: -share[1])
    calls = ", ".join(f"{percent(share)} to {brief(name)}" for name, share in others)
    figures = [
        KeyFigure("quality", percent(routed.quality.value), "of the prompts answered right"),
        KeyFigure("calls", percent(first[1]), f"to {brief(first[0])}; {calls}"),
    ]
    if over is not None:
        points = f"{100 * over.low:+.1f} to {100 * over.high:+.1f}"
        than = f"points over always asking {brief(data.strong)}, {points}"
        figures.insert(1, KeyFigure("more right", f"{100 * over.value:+.1f}", than))
    return tuple(figures)


def _of(band: Band, strong: str) -> str:
    interval = "" if math.isnan(band.low) else f", {100 * band.low:.1f} to {100 * band.high:.1f}"
    return f"of {strong}'s{interval}"


def _verdict(data: ReportData) -> Verdict | None:
    """In the words of the measurement; without one, how to get one."""
    verdict = data.verdict
    if verdict is None:
        if data.measured is None:
            return Verdict("mixed", "This router was not measured.", MEASURE_IT)
        return Verdict("mixed", "The router has changed since it was measured.", _OUTDATED)
    kind: Literal["good", "mixed", "bad"] = "bad"
    if verdict.pays:
        kind = "good" if verdict.beats_random else "mixed"
    sentence = str(verdict).removesuffix(verdict.advice).strip()
    use = f'Ask through it: pliant route ask --router {data.folder} "..."'
    return Verdict(kind, sentence, verdict.advice or use)


# --- sentences -----------------------------------------------------------------------------------


def summary(data: ReportData) -> list[str]:
    """The threshold in words, and what it does on the measured prompts."""
    promise, measured = data.file.threshold.sentence, data.measured
    verdict = [] if data.verdict is None else [str(data.verdict)]
    sentences = [*verdict, promise[:1].upper() + promise[1:]]
    if measured is None:
        return [*sentences, MEASURE_IT]
    evaluation = measured.evaluation
    if evaluation.left_out:
        sentences.append(
            f"The router was fitted on {evaluation.left_out:,} of the prompts; they were left out, "
            "and count nowhere here."
        )
    if evaluation.no_difference:
        sentences.append(evaluation.no_difference)
    if evaluation.incomplete:
        sentences.append(
            f"Not every model was asked {evaluation.incomplete:,} of the prompts; they count "
            "nowhere here."
        )
    if measured.outdated:
        return [*sentences, f"Measured on {measured.where}.", _OUTDATED]
    routed = evaluation.routed
    shares = [f"{percent(part)} to {name}" for name, part in routed.shares.items()]
    cost = f"at {_share(routed.of_strong_cost)} of its cost"
    if evaluation.same_price:
        cost = "and every model costs the same"
    sentences.append(
        f"On {measured.where} calls go {' and '.join([', '.join(shares[:-1]), shares[-1]])}: "
        f"{_share(routed.of_strong)} of the quality of {data.strong} alone, {cost}."
    )
    if data.file.scorer.cost:
        scoring = amount(data.file.scorer.cost, data.file.unit)
        free = data.file.scorer.continued_by
        but = "" if free is None else f"; answers of {free} continue from it and pay nothing"
        sentences.append(f"Scoring a prompt costs {scoring}, which is counted in that{but}.")
    if data.verdict is not None:
        sentences += data.verdict.notes
    goes = f"; they go to {data.file.default}" if data.file.novel == "default" else ""
    return [*sentences, *tables.novelty(evaluation, goes)]


def label_sentences(data: ReportData) -> list[str]:
    if not data.file.label_cost:
        return ["The router's file does not say what its labels cost."]
    sentences, unit = [], data.file.unit
    if data.label_cost is None:
        sentences.append(f"What the labels cost is not known in {unit} for every model.")
    elif data.paid_back is not None:
        sentences.append(
            f"At the measured saving the router has earned its labels after "
            f"{count(data.paid_back)} prompts."
        )
    elif data.verdict is not None and data.verdict.same_price:
        sentences.append(
            "Every model costs the same, so nothing is saved: the labels are paid back in right "
            "answers."
        )
    elif data.verdict is not None:
        sentences.append("At this threshold nothing is saved, so the labels are never earned back.")
    one_price = same_price(data.file.costs)
    if data.totals is not None and data.label_cost is not None and not one_price:
        saved = data.totals.saved
        left, verb = saved - data.label_cost, "saved" if saved >= 0 else "lost"
        sentences.append(
            f"By the ledger {amount(abs(saved), unit)} were {verb} until now: "
            f"{amount(abs(left), unit)} {'more' if left >= 0 else 'less'} than the labels cost."
        )
    return sentences


def ledger_sentences(data: ReportData) -> list[str]:
    totals = data.totals
    if totals is None:
        return ["There is no ledger, or nothing in it yet: the router has not been asked."]
    unit = data.file.unit
    against = f"as much as always asking {data.strong}"
    if totals.saved:
        less = "less" if totals.saved > 0 else "more"
        against = f"{amount(abs(totals.saved), unit)} {less} than always asking {data.strong}"
    chose = totals.decisions - totals.answered - totals.failed
    sentences = [
        f"{totals.decisions:,} decisions: {totals.answered:,} answered, {totals.failed:,} failed, "
        f"{chose:,} only chose. They cost {amount(totals.cost, unit)}, {against}.",
        f"Another model stood in {totals.fell_over:,} times; {totals.from_session:,} followed "
        f"their session; {totals.novel:,} prompts were unlike those that the router was fitted on.",
    ]
    explored = totals.exploration
    if explored["prompts"]:
        sentences.append(
            f"{explored['prompts']:,.0f} novel prompts were explored: the other models' "
            f"{explored['answers']:,.0f} answers cost {amount(explored['cost'], unit)} of the "
            f"total, and {explored['graded']:,.0f} of these prompts are graded."
        )
    if not totals.windows:
        return [*sentences, "Too few scores until now to say whether they have drifted."]
    latest, drifted = totals.windows[-1], len(totals.drifted)
    sentences.append(
        f"Drift: {drifted:,} of {len(totals.windows):,} windows of scores lie beyond what chance "
        f"explains; the latest of {latest.size:,} prompts is {latest.distance:.3f} away (chance "
        f"stays below {latest.bound:.3f})."
    )
    if drifted:
        sentences.append("Label prompts of today, and fit or calibrate again.")
    return sentences


# --- sections and their pictures -----------------------------------------------------------------


def _quality_against_cost(data: ReportData) -> Section:
    name, measured = "Quality against cost", data.measured
    if measured is None:
        return Section(name, summary(data))
    evaluation = measured.evaluation
    notes = [] if evaluation.by_price else ["The band holds 95 % of resamples of the prompts."]
    if evaluation.perfect is None:
        notes.append("With --labels perfect routing is drawn, too.")
    if evaluation.by_price is not None:
        notes.append(
            "The router's line and the perfect one use all models, as the price of cost goes up; "
            f"the others go between {data.weak} and {data.strong} alone."
        )
    elif len(data.file.names) > 2:
        notes.append(
            f"The lines go between {data.weak} and {data.strong} alone; the point uses all "
            "models, and lies off them. With --labels the router's line does so, too."
        )
    at_the_top = None if data.verdict is None else str(data.verdict)
    sentences = [sentence for sentence in summary(data) if sentence != at_the_top]
    sentences += [" ".join(notes)] if notes else []
    picture = (_curves(data, measured), f"{name}.")
    if evaluation.same_price:
        sentences = [each for each in sentences if each != " ".join(notes)]
        picture = (_qualities(data, measured), "Quality, of the models that all cost the same.")
    return Section(name, sentences, [tables.points(data, measured)], [picture])


def _qualities(data: ReportData, measured: Measured) -> str:
    """At one price there is no curve: each model alone, the router, and perfect routing."""
    evaluation = measured.evaluation
    exact = {brief(name): quality for name, quality in evaluation.alone.items()}
    verdict, routed = data.verdict, evaluation.routed.quality
    if verdict is not None and verdict.over_groups is not None:
        exact[tables.ASSIGNMENT] = routed.value - verdict.over_groups.value
    drawn = {name: (quality, quality, quality) for name, quality in exact.items()}
    if not measured.outdated:
        drawn["the router"] = (routed.value, routed.low, routed.high)
    if evaluation.perfect is not None:
        best = max(evaluation.perfect.quality)
        drawn["perfect routing"] = (best, best, best)
    roles: Roles = {"the router": "ours", "perfect routing": "bound"}
    return plots.intervals(drawn, roles, "share of right answers")


def _curves(data: ReportData, measured: Measured) -> str:
    """The router in its band, its baselines and perfect routing, and the point that was chosen."""
    evaluation, report = measured.evaluation, measured.evaluation.report
    curve, scorer = report.curve, evaluation.scorer
    always = evaluation.strong_cost or 1.0
    cheap = (evaluation.cheap_cost / always, report.weak_quality)
    expensive = (evaluation.strong_cost / always, report.strong_quality)
    drawn = {f"this router ({scorer})": _line(evaluation.by_price or curve, always)}
    if evaluation.perfect is not None:
        drawn["perfect"] = _line(evaluation.perfect, always, "bound")
    drawn["random"] = Line((cheap[0], expensive[0]), (cheap[1], expensive[1]), role="control")
    for kind, baseline in evaluation.baselines.items():
        if kind not in ("random", scorer):
            drawn[kind] = _line(baseline.curve, always, "rival" if kind == "text" else "control")
    point = None
    if not measured.outdated:
        at = (evaluation.routed.cost.value / always, evaluation.routed.quality.value)
        point = (f"chosen:\n{data.goal or 'by hand'}", at)
    ends = {brief(data.weak): cheap, brief(data.strong): expensive}
    x = f"cost (1 = always {brief(data.strong)})"
    return plots.lines(drawn, x, "share of right answers", ends, point)


def _line(curve: Curve | CostLine, always: float, role: Role = "ours") -> Line:
    """Ours with its band."""
    cost = [float(x) / always for x in curve.cost]
    if isinstance(curve, Curve) and role == "ours":
        return Line(cost, list(curve.quality), list(curve.low), list(curve.high))
    return Line(cost, list(curve.quality), role=role)


def _figures(data: ReportData, measured: Measured) -> Section:
    shown = [tables.metrics(measured.evaluation), tables.baselines(measured.evaluation)]
    return Section("Figures, and what they are worth", [f"On {measured.where}."], shown)


def _groups(data: ReportData, measured: Measured) -> list[Section]:
    """Which kinds of prompts the router harms most."""
    if not measured.evaluation.groups:
        return []
    strong, groups = brief(data.strong), tables.by_damage(measured.evaluation)[: tables.GROUPS]
    lost = {g.name: (g.lost.value, g.lost.low, g.lost.high) for g in groups if g.lost is not None}
    sentence = (
        f"How much less often the router is right than {data.strong} alone, with 95 % intervals: "
        "above 0 the group loses by routing."
    )
    x = f"share of right answers below {strong}"
    roles: Roles = {name: "bad" if low > 0 else "control" for name, (_, low, _) in lost.items()}
    pictures = [(plots.intervals(lost, roles, x), "The most damaged first.")] if lost else []
    return [Section("Groups", [sentence], [tables.groups(data, measured)], pictures)]


def _probabilities(measured: Measured) -> list[Section]:
    calibration, histogram = measured.evaluation.calibration, measured.evaluation.histogram
    if not calibration:
        return []
    pictures = []
    for each in calibration:
        x = f"predicted P({brief(each.model)} is right)"
        picture = plots.reliability(each.bins, x, "share that was right")
        pictures.append((picture, f"{each.model}: predicted and observed."))
    sentences = [
        "ECE is the mean distance between predicted and observed shares (debiased; a constant "
        "prediction can have none, though it tells nothing about a prompt). Brier is the mean "
        "squared error; skill is the part of a constant's error that is gone. The bars below each "
        "curve count its prompts."
    ]
    table = tables.probabilities(measured.evaluation)
    shown = [Section("Probabilities", sentences, [table], pictures)]
    if histogram is not None:
        model, name = histogram.model, brief(histogram.model)
        counts = {f"{name} right": histogram.right, f"{name} wrong": histogram.wrong}
        roles: Roles = {f"{name} right": "good", f"{name} wrong": "bad"}
        picture = plots.histograms(histogram.edges, counts, roles, "score", "prompts")
        captioned = (picture, f"Scores, by whether {model} was right.")
        sentence = f"The score is the probability that {model} fails."
        shown.append(Section("Scores", [sentence], pictures=[captioned]))
    return shown


def _examples(data: ReportData, measured: Measured) -> list[Section]:
    shown = [table for table in tables.examples(data, measured) if table.rows]
    sentence = (
        f"The gain is how much more often {data.strong} is expected to be right than "
        f"{data.weak}; {tables.RIGHT} and {tables.WRONG} say who was."
    )
    return [Section("On both sides of the threshold", [sentence], shown)] if shown else []


def _labels(data: ReportData) -> Section:
    shown = [tables.labels(data)] if data.file.label_cost else []
    return Section("What the labels cost", label_sentences(data), shown)


def _ledger(data: ReportData) -> Section:
    if data.totals is None:
        return Section("The ledger", ledger_sentences(data))
    windows = data.totals.windows
    at = [window.number for window in windows]
    pictures = []
    if len(windows) > 1:
        distance = Line(at, [window.distance for window in windows])
        bound = Line(at, [window.bound for window in windows], role="control")
        drawn = {"distance": distance, "chance stays below": bound}
        picture = plots.lines(drawn, "window", "distance of the scores")
        pictures.append((picture, "Drift of the scores."))
    return Section("The ledger", ledger_sentences(data), [tables.calls(data)], pictures)


def _share(band: Band) -> str:
    if math.isnan(band.value):
        return "an unknown share"
    if math.isnan(band.low) or math.isnan(band.high):
        return percent(band.value)
    return f"{percent(band.value)} [{100 * band.low:.1f}, {100 * band.high:.1f}]"
