"""The pictures of a report: quality against cost, probabilities, scores, and drift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pliant.cli.routes.gathered import Gathered, Measured
from pliant.cli.routes.report_tables import brief
from pliant.reports import plots
from pliant.reports.plots import Line

Json = Mapping[str, Any]


def quality_against_cost(found: Gathered, measured: Measured) -> str:
    """The router in its band, what it is held against, and the point that was chosen."""
    content = measured.content
    curve = content["curve"]
    whole = curve["cost"][-1] or 1.0
    cheap = (curve["cost"][0] / whole, content["weak_quality"])
    dear = (curve["cost"][-1] / whole, content["strong_quality"])
    scorer = str(content["scorer"])
    drawn = {f"this router ({scorer})": _line(measured.worth or curve, whole)}
    if measured.perfect is not None:
        drawn["perfect"] = _line(measured.perfect, whole, faint=True)
    drawn["random"] = Line((cheap[0], dear[0]), (cheap[1], dear[1]), faint=True)
    for kind, said in content["baselines"].items():
        if kind not in ("random", scorer):
            drawn[kind] = _line(said["curve"], whole, faint=True)
    point = None
    if not measured.outdated:
        routed = content["routed"]
        at = (routed["cost"]["value"] / whole, routed["quality"]["value"])
        point = (f"chosen:\n{found.goal or 'by hand'}", at)
    ends = {brief(found.weak): cheap, brief(found.strong): dear}
    x = f"cost (1 = always {brief(found.strong)})"
    return plots.lines(drawn, ends, point, x, "share of right answers")


def probabilities(kept: Json) -> str:
    """One model's P(right), against how often it was right."""
    bins = [(float(p), float(share), float(n)) for p, share, n in kept["bins"]]
    return plots.reliability(
        bins, f"predicted P({brief(kept['model'])} is right)", "share that was right"
    )


def scores(histogram: Json) -> str:
    """Scores of prompts that the cheapest model got right, and of those that it did not."""
    counts = {f"{brief(histogram['model'])} {side}": histogram[side] for side in ("right", "wrong")}
    return plots.histograms(histogram["edges"], counts, "score", "prompts")


def drift(windows: list[Json]) -> str:
    """The distance of each window of scores, and what chance stays below."""
    at = [int(window["number"]) for window in windows]
    drawn = {
        "distance": Line(at, [float(window["distance"]) for window in windows]),
        "chance stays below": Line(at, [float(window["bound"]) for window in windows], faint=True),
    }
    return plots.lines(drawn, {}, None, "window", "distance of the scores")


def _line(curve: Json, whole: float, faint: bool = False) -> Line:
    cost = [x / whole for x in curve["cost"]]
    return Line(cost, curve["quality"], curve.get("low"), curve.get("high"), faint)
