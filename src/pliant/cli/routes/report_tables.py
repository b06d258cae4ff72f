"""The tables of a report: the same on the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pliant.cli.routes.gathered import Gathered, Measured
from pliant.reports.tables import Table, count, size

Json = Mapping[str, Any]
RIGHT, WRONG = "✓", "✗"
_PROMPT, _MODEL = 72, 20  # letters of a prompt that are shown, and of a model's name in a heading
_NAMES = {
    "apgr": "APGR",
    "within_group_apgr": "APGR within groups",
    "cpt50": "CPT(50)",
    "cpt80": "CPT(80)",
    "aiq": "AIQ",
    "auc": "AUC",
}


def points(found: Gathered, measured: Measured) -> Table:
    """What the threshold does, between one model alone and the other."""
    content, unit = measured.content, found.file.unit
    curve, routed = content["curve"], content["routed"]
    whole = curve["cost"][-1]

    def alone(model: str, share: str, quality: float, cost: float) -> list[str]:
        part = f"{cost / whole:.3f}" if whole else "-"
        return [brief(model), share, f"{quality:.3f}", part, figures(cost)]

    router = [
        "the router",
        _percent(routed["shares"][found.strong]),
        band(routed["quality"]),
        band(routed["of_strong_cost"]),
        figures(routed["cost"]["value"]),
    ]
    rows = [
        alone(found.weak, "0 %", content["weak_quality"], curve["cost"][0]),
        *([] if measured.outdated else [router]),
        alone(found.strong, "100 %", content["strong_quality"], whole),
    ]
    name = brief(found.strong)
    head = ["", f"to {name}", "quality", f"cost ({name} = 1)", unit]
    said = "" if found.goal is None or measured.outdated else f", for {found.goal}"
    title = f"Quality and cost of a prompt{said}"
    return Table(title, head, rows, right=frozenset(head[1:]))


def metrics(found: Gathered, measured: Measured) -> Table:
    content = measured.content
    best = content["oracle_apgr"]
    says = {
        "apgr": "share of the models' difference that is recovered, over all budgets; chance .5"
        + ("" if best is None else f", at best {best:.3f}"),
        "within_group_apgr": "the same of the order inside groups; knowing the groups alone .5",
        "cpt50": f"share of calls to {found.strong} that recovers half of the difference",
        "cpt80": "the same for 80 % of it",
        "aiq": "mean quality over the range of costs",
        "auc": f"does the score tell what {found.weak} gets wrong? chance .5",
    }
    rows = [
        [_NAMES.get(name, name), number(said["value"]), interval(said), says.get(name, "")]
        for name, said in content["metrics"].items()
    ]
    return Table(
        "Metrics", ["", "value", "95 % interval", "what it is"], rows, frozenset(["value"])
    )


def baselines(measured: Measured, narrow: bool = False) -> Table:
    """Each scorer on the same prompts, and how far the router lies above it."""
    content = measured.content
    router = str(content["scorer"])
    others = {kind: said["metrics"] for kind, said in content["baselines"].items()}
    others.pop(router, None)
    order = sorted(others, key=lambda kind: -(others[kind]["apgr"]["value"] or -math.inf))
    shown = [
        name
        for name in (("cpt80",) if narrow else ("within_group_apgr", "cpt50", "cpt80", "aiq"))
        if name in content["metrics"]
    ]

    def row(kind: str, said: Json, ahead: str) -> list[str]:
        return [kind, band(said["apgr"]), *(number(said[name]["value"]) for name in shown), ahead]

    rows = [row(router, content["metrics"], "this router")]
    rows += [row(kind, others[kind], signed(content["over"][kind])) for kind in order]
    head = ["scorer", "APGR", *(_NAMES[name] for name in shown), "router's APGR above"]
    title = "The router beside its baselines, on the same prompts"
    return Table(title, head, rows, right=frozenset(head[1:]))


def probabilities(measured: Measured) -> Table:
    rows = [
        [
            brief(kept["model"]),
            number(kept["ece"]),
            number(kept["ece_constant"]),
            number(kept["brier"]),
            number(kept["brier_constant"]),
            "-" if kept["skill"] is None else f"{kept['skill']:.2f}",
        ]
        for kept in measured.content["calibration"]
    ]
    head = ["P(right) of", "ECE", "constant's", "Brier", "constant's Brier", "skill"]
    return Table("Probabilities beside a constant's", head, rows, right=frozenset(head[1:]))


def groups(found: Gathered, measured: Measured) -> Table:
    rows = [
        [
            g.name,
            f"{g.n:,}",
            f"{g.weak:.3f}",
            f"{g.strong:.3f}",
            f"{g.routed:.3f}",
            _percent(g.share),
        ]
        for g in measured.groups
    ]
    weak, strong = brief(found.weak), brief(found.strong)
    head = ["group", "prompts", weak, strong, "routed", f"to {strong}"]
    return Table("Group by group: share of right answers", head, rows, right=frozenset(head[1:]))


def examples(found: Gathered, measured: Measured) -> list[Table]:
    """On both sides of the threshold."""
    sides = measured.content["examples"]
    stays, goes = (
        {(one["prompt"], one["gain"]): one for kind in kinds for one in sides[kind]}
        for kinds in (("surely cheap", "just cheap"), ("just dear", "surely dear"))
    )
    return [
        _examples(
            f"Stay with {found.weak}: the surest, and the nearest to the threshold",
            stays,
            found,
            measured,
        ),
        _examples(
            f"Go to {found.strong}: the nearest to the threshold, and the surest",
            goes,
            found,
            measured,
        ),
    ]


def _examples(title: str, some: Mapping[Any, Json], found: Gathered, measured: Measured) -> Table:
    known = measured.scores or {}
    rows = [
        [
            short(one["prompt"]),
            f"{known[one['prompt']]:.2f}" if one["prompt"] in known else "-",
            f"{one['gain']:+.3f}",
            *(mark(one["right"][name]) for name in found.file.names),
        ]
        for one in sorted(some.values(), key=lambda one: one["gain"])
    ]
    head = ["prompt", "score", "gain", *map(brief, found.file.names)]
    colours = {RIGHT: "green", WRONG: "red"}
    return Table(title, head, rows, right=frozenset(["score", "gain"]), colours=colours)


def ladder(found: Gathered) -> Table:
    rows = [
        [
            str(rung["scorer"]),
            band(rung["value"]),
            "-" if rung["behind"] is None else signed(rung["behind"]),
            f"{rung['ms']:.2f}",
            size(rung["bytes"]),
            "kept" if rung["scorer"] == found.file.scorer.kind else "",
        ]
        for rung in found.ladder
    ]
    what = "APGR" if len(found.file.names) == 2 else "area"
    head = ["scorer", what, "behind the best", "ms", "size", ""]
    title = "The scorers that were tried at the fit (ms: of one decision)"
    return Table(title, head, rows, right=frozenset(head[1:5]), colours={"kept": "green"})


def calls(found: Gathered) -> Table:
    """What the ledger has of each model."""
    assert found.totals is not None
    unit = found.file.unit
    models = found.totals.models
    named = [name for name in found.file.names if name in models]
    rows = [
        [
            name,
            f"{int(models[name]['calls']):,}",
            _percent(models[name]["share"]),
            amount(models[name]["cost"], unit),
            amount(models[name]["saved"], unit),
            count(models[name]["prompt_tokens"] + models[name]["answer_tokens"]),
        ]
        for name in [*named, *sorted(set(models) - set(named))]
    ]
    head = ["model", "calls", "share", "cost", "saved", "tokens"]
    return Table("Calls by model", head, rows, right=frozenset(head[1:]))


def labels(found: Gathered) -> Table:
    """What it cost to make the labels."""
    rows = []
    for name, used in found.file.label_cost.items():
        cost = used.get(found.file.unit)
        said = "-" if cost is None else amount(cost, found.file.unit)
        rows.append([name, f"{int(used.get('calls', 0)):,}", said])
    if found.label_cost is not None:
        rows.append(["together", "", amount(found.label_cost, found.file.unit)])
    head = ["model", "calls", "cost"]
    return Table("Labels by model", head, rows, right=frozenset(head[1:]))


# --- figures in words ----------------------------------------------------------------------------


def amount(cost: float, unit: str) -> str:
    """A cost, with its unit: $0.0012, 56.1M flops, 3.4 ms."""
    if unit == "usd":
        return f"${cost:,.2f}" if 1 <= abs(cost) < 1e6 else f"${figures(cost)}"
    return f"{figures(cost)} {unit}"


def figures(cost: float) -> str:
    """Three or so of them."""
    return count(cost) if abs(cost) >= 100 else f"{cost:.3g}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def band(found: Json) -> str:
    """A value with its interval; a dash for what is not defined."""
    return "-" if found["value"] is None else f"{found['value']:.3f} {interval(found)}"


def interval(found: Json) -> str:
    undefined = found["low"] is None or found["high"] is None
    return "" if undefined else f"[{found['low']:.3f}, {found['high']:.3f}]"


def signed(found: Json) -> str:
    if found["value"] is None or found["low"] is None:
        return "-"
    return f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def mark(right: float) -> str:
    return {0.0: WRONG, 1.0: RIGHT}.get(right) or f"{right:.2f}"


def brief(model: str) -> str:
    """A model's name for a heading: without its owner, and not too long."""
    return short(model.rstrip("/").rpartition("/")[2] or model, _MODEL)


def short(prompt: str, letters: int = _PROMPT) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= letters else line[: letters - 1] + "…"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
