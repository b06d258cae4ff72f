"""The tables of `pliant route`: the same on the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pliant.cli.route.report_data import Measured, ReportData
from pliant.reports.tables import Table, count, size
from pliant.routing.fitting.evaluation import Evaluation, Example, GroupResult
from pliant.routing.live.decision import Costing
from pliant.routing.units import amount, percent, same_price, saving
from pliant.stats import Band, from_json

RIGHT, WRONG = "✓", "✗"
ASSIGNMENT = "best model of each group"
"""The control that knows the group of every prompt."""
GROUPS, EXAMPLES = 12, 3
"""Rows that come first on a page; the others are folded. There are two tables of examples."""
_PROMPT, _MODEL = 72, 20  # letters of a prompt that are shown, and of a model's name in a heading
_NAMES = {
    "apgr": "APGR",
    "within_group_apgr": "APGR within groups",
    "cpt50": "CPT(50)",
    "cpt80": "CPT(80)",
    "aiq": "AIQ",
    "lift": "lift",
    "auc": "AUC",
}


def points(data: ReportData, measured: Measured) -> Table:
    """The router at its threshold, beside each model alone; of two at two prices, between them."""
    if data.share_means_nothing:
        return _beside_each(data, measured)
    evaluation, unit = measured.evaluation, data.file.unit
    report, routed, always = evaluation.report, evaluation.routed, evaluation.strong_cost

    def alone(model: str, share: str, quality: float, cost: float) -> list[str]:
        part = f"{cost / always:.3f}" if always else "-"
        return [brief(model), share, f"{quality:.3f}", part, amount(cost, unit)]

    router = ["the router", percent(routed.share), band(routed.quality)]
    router += [band(routed.of_strong_cost), amount(routed.cost.value, unit)]
    rows = [
        alone(data.weak, "0 %", report.weak_quality, evaluation.cheap_cost),
        *([] if measured.outdated else [router]),
        alone(data.strong, "100 %", report.strong_quality, always),
    ]
    name = brief(data.strong)
    head = ["", f"to {name}", "quality", f"cost ({name} = 1)", "cost"]
    goal = "" if data.goal is None or measured.outdated else f", for {data.goal}"
    return Table(f"Quality and cost of a prompt{goal}", head, rows, right=frozenset(head[1:]))


def _beside_each(data: ReportData, measured: Measured) -> Table:
    """Models of one price, or more than two: each alone, the router, and the best assignment."""
    evaluation, unit = measured.evaluation, data.file.unit
    routed, verdict = evaluation.routed, data.verdict
    rows = [
        [
            brief(name),
            "-" if measured.outdated else percent(routed.shares[name]),
            f"{quality:.3f}",
            amount(evaluation.costs.get(name, math.nan), unit),
        ]
        for name, quality in evaluation.alone.items()
    ]
    if not measured.outdated:
        cost = amount(routed.cost.value, unit)
        rows.append(["the router", "", band(routed.quality), cost])
        if verdict is not None and verdict.over_groups is not None:
            quality = routed.quality.value - verdict.over_groups.value
            rows.append([ASSIGNMENT, "", f"{quality:.3f}", cost])
    head = ["", "router's calls", "quality", "cost"]
    goal = "" if data.goal is None or measured.outdated else f", for {data.goal}"
    return Table(f"Quality and cost of a prompt{goal}", head, rows, right=frozenset(head[1:]))


def metrics(evaluation: Evaluation) -> Table:
    """Each metric with its interval and its meaning."""
    best, (weak, *_, strong) = evaluation.report.oracle_apgr, evaluation.report.models
    most = evaluation.report.oracle_lift
    meanings = {
        "apgr": "share of the models' difference that is recovered, over all budgets; chance .5"
        + ("" if math.isnan(best) else f", at best {best:.3f}"),
        "within_group_apgr": "the same of the order inside groups; knowing the groups alone .5",
        "cpt50": f"share of calls to {strong} that recovers half of the difference",
        "cpt80": "the same for 80 % of it",
        "aiq": "quality of the likeliest model for each prompt"
        if evaluation.same_price
        else "mean quality over the range of costs",
        "lift": "mean quality beyond the best mixture of single models at the same cost; chance 0"
        + ("" if math.isnan(most) else f", at best {most:.3f}"),
        "auc": f"does the score tell what {weak} gets wrong? chance .5",
    }
    rows = [
        [_NAMES.get(name, name), number(value.value), interval(value), meanings.get(name, "")]
        for name, value in evaluation.metrics.items()
    ]
    head = ["", "value", "95 % interval", "what it is"]
    return Table("Metrics", head, rows, frozenset(["value"]))


def baselines(evaluation: Evaluation, narrow: bool = False) -> Table:
    """Each scorer on the same prompts, and how much higher the router's APGR (or lift) is."""
    others = {kind: report.metrics for kind, report in evaluation.baselines.items()}
    ranked_by = evaluation.report.ranked_by
    others.pop(evaluation.scorer, None)

    def rank(kind: str) -> float:
        value = others[kind][ranked_by].value
        return math.inf if math.isnan(value) else -value

    names = ("cpt80",) if narrow else ("within_group_apgr", "cpt50", "cpt80", "aiq")
    names = names if ranked_by == "apgr" else ("aiq",)
    shown = [name for name in names if name in evaluation.metrics]

    def row(kind: str, values: Mapping[str, Band], ahead: str) -> list[str]:
        return [kind, band(values[ranked_by]), *(number(values[n].value) for n in shown), ahead]

    rows = [row(evaluation.scorer, evaluation.metrics, "this router")]
    rows += [
        row(kind, others[kind], signed(evaluation.over[kind])) for kind in sorted(others, key=rank)
    ]
    ranking = _NAMES[ranked_by]
    head = ["scorer", ranking, *(_NAMES[name] for name in shown), f"router's {ranking} above"]
    title = "The router beside its baselines, on the same prompts"
    return Table(title, head, rows, right=frozenset(head[1:]))


def probabilities(evaluation: Evaluation) -> Table:
    rows = [
        [
            brief(each.model),
            *map(number, (each.ece, each.ece_constant, each.brier, each.brier_constant)),
            "-" if each.skill is None else f"{each.skill:.2f}",
        ]
        for each in evaluation.calibration
    ]
    head = ["P(right) of", "ECE", "constant's", "Brier", "constant's Brier", "skill"]
    return Table("Probabilities beside a constant's", head, rows, right=frozenset(head[1:]))


def groups(data: ReportData, measured: Measured) -> Table:
    """The most damaged first."""
    rows = [
        [
            g.name,
            f"{g.n:,}",
            *map(number, (*(g.alone.values() or (g.weak, g.strong)), g.routed)),
            "-" if g.lost is None else signed(g.lost),
            percent(g.share),
        ]
        for g in by_damage(measured.evaluation)
    ]
    strong = brief(data.strong)
    alone = any(g.alone for g in measured.evaluation.groups)
    models = [brief(name) for name in (data.file.names if alone else (data.weak, data.strong))]
    head = ["group", "prompts", *models, "routed", f"below {strong}", f"to {strong}"]
    title = "Group by group, the most damaged first: share of right answers"
    return Table(title, head, rows, right=frozenset(head[1:]), shown=GROUPS)


def by_damage(evaluation: Evaluation) -> list[GroupResult]:
    return sorted(evaluation.groups, key=lambda g: g.routed - g.strong)


def examples(data: ReportData, measured: Measured) -> list[Table]:
    """On both sides of the threshold."""
    sides = measured.evaluation.examples
    stays = [*sides["surely cheap"], *sides["just cheap"]]
    goes = [*sides["just expensive"], *sides["surely expensive"]]
    verbs = ("To", "To") if data.share_means_nothing else ("Stay with", "Go to")
    stay = f"{verbs[0]} {data.weak}: the surest, and the nearest to the threshold"
    go = f"{verbs[1]} {data.strong}: the nearest to the threshold, and the surest"
    return [_examples(stay, stays, data), _examples(go, goes, data)]


def _examples(title: str, examples: Iterable[Example], data: ReportData) -> Table:
    different = {(example.prompt, example.gain): example for example in examples}
    rows = [
        [
            short(example.prompt),
            "-" if example.score is None else f"{example.score:.2f}",
            f"{example.gain:+.3f}",
            *(mark(example.right[name]) for name in data.file.names),
        ]
        for example in sorted(different.values(), key=lambda example: example.gain)
    ]
    head = ["prompt", "score", "gain", *map(brief, data.file.names)]
    colours = {RIGHT: "green", WRONG: "red"}
    right = frozenset(["score", "gain"])
    return Table(title, head, rows, right=right, colours=colours, shown=EXAMPLES)


def ladder(
    rungs: Iterable[Mapping[str, Any]],
    models: Sequence[str],
    selected: str,
    perfect: float | None = None,
) -> Table:
    """The scorers that a fit tried, from its record; `perfect` is the best possible APGR."""
    rungs, usual = list(rungs), "apgr" if len(models) == 2 else "aiq"
    # Records of earlier versions do not name the metric.
    metric = next((str(rung["metric"]) for rung in rungs if "metric" in rung), usual)
    head = ["scorer", metric.upper(), "behind the best"]
    is_net = any(rung.get("cost") for rung in rungs)
    net = ["at equal cost"] if is_net else []
    head[2:2] = net
    head += ["ms", "size", "fitted in", ""]
    best = [number(perfect)] * (1 + len(net)) if perfect is not None else []
    rows = [["perfect routing", *best, *["-"] * 4, ""]] if best else []
    for rung in rungs:
        behind, value = rung["behind"], rung["value"]
        rows.append(
            [
                str(rung["scorer"]),
                number(from_json(Band, value).value),
                *(number(from_json(Band, rung.get("net", value)).value) for _ in net),
                "-" if behind is None else signed(from_json(Band, behind)),
                f"{rung['ms']:.2f}",
                size(rung["bytes"]),
                f"{rung['fit_seconds']:.1f} s",
                RIGHT if rung["scorer"] == selected else "",
            ]
        )
    title = "The scorers (ms: of one decision; behind the best: with 95 % intervals)"
    if is_net:
        title = f"{title[:-1]}; at equal cost: with what scoring costs)"
    return Table(title, head, rows, right=frozenset(head[1:-1]), colours={RIGHT: "green"})


def calls(data: ReportData) -> Table:
    """Each model's calls in the ledger."""
    assert data.totals is not None
    unit, models = data.file.unit, data.totals.models
    saves = not same_price(data.file.costs)
    named = [name for name in data.file.names if name in models]
    rows = [
        [
            name,
            f"{int(models[name]['calls']):,}",
            percent(models[name]["share"]),
            amount(models[name]["cost"], unit),
            *([saving(models[name]["saved"], unit, data.strong).removeprefix("saved ")] * saves),
            count(models[name]["prompt_tokens"] + models[name]["answer_tokens"]),
        ]
        for name in [*named, *sorted(set(models) - set(named))]
    ]
    head = ["model", "calls", "share", "cost", *["saved"] * saves, "tokens"]
    return Table("Calls by model", head, rows, right=frozenset(head[1:]))


def labels(data: ReportData) -> Table:
    """What it cost to make the labels."""
    rows = []
    for name, cost in Costing(data.file).labels_by_model().items():
        shown = "-" if cost is None else amount(cost, data.file.unit)
        rows.append([name, f"{int(data.file.label_cost[name].get('calls', 0)):,}", shown])
    if data.label_cost is not None:
        rows.append(["together", "", amount(data.label_cost, data.file.unit)])
    head = ["model", "calls", "cost"]
    return Table("Labels by model", head, rows, right=frozenset(head[1:]))


def novelty(evaluation: Evaluation, goes: str = "") -> list[str]:
    """The shares of novel prompts and of consistently routed paraphrases, in sentences."""
    sentences, same = [], evaluation.paraphrases
    if evaluation.novel is not None:
        sentences.append(
            f"{percent(evaluation.novel)} of the prompts are novel, unlike those that the router "
            f"was fitted on{goes}."
        )
    if same is not None:
        sentences.append(
            f"Of {same.questions:,} questions in several wordings {percent(same.same_model)} go "
            f"to one model in all of them; the predicted gain moves by {same.spread:.3f} on "
            "average."
        )
    return sentences


# --- how figures are written ---------------------------------------------------------------------


def number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def band(value: Band) -> str:
    """A value with its interval; a dash for what is not defined."""
    return "-" if math.isnan(value.value) else f"{value.value:.3f} {interval(value)}"


def interval(value: Band) -> str:
    undefined = math.isnan(value.low) or math.isnan(value.high)
    return "" if undefined else f"[{value.low:.3f}, {value.high:.3f}]"


def signed(value: Band) -> str:
    if math.isnan(value.value) or math.isnan(value.low):
        return "-"
    return f"{value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def mark(right: float) -> str:
    return {0.0: WRONG, 1.0: RIGHT}.get(right) or f"{right:.2f}"


def brief(model: str) -> str:
    """A model's name for a heading: without its owner, and not too long."""
    return short(model.rstrip("/").rpartition("/")[2] or model, _MODEL)


def short(prompt: str, letters: int = _PROMPT) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= letters else line[: letters - 1] + "…"
