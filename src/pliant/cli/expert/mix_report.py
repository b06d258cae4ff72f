"""The page of a mixture of experts: its coefficients, their search, and the test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.reports.page import KeyFigure, Section, Top, Verdict, write
from pliant.reports.plots import Line, Roles, intervals, lines, signed_bars
from pliant.reports.tables import Table

if TYPE_CHECKING:
    from pliant.experts.adapting import FewShot
    from pliant.stats import Band


def write_report(
    path: Path, mixed: FewShot, scores: Mapping[str, Band], tested: int, reward: str | None
) -> Path:
    """Write the page; without a `reward`, the search was by likelihood."""
    from pliant.experts.adapting.strategy import name_of

    sections = [_coefficients(mixed), _search(mixed, reward)]
    if scores:
        sections.append(_test(scores, tested))
    return write(path, f"Mixture: {name_of(mixed.mixture)}", sections, _top(scores, tested))


def _top(scores: Mapping[str, Band], tested: int) -> Top:
    """What the mixture gets right beside the base and the best expert alone, if it was tested."""
    mixture, base = scores.get("mixture"), scores.get("base")
    if mixture is None or base is None:
        return Top()
    alone = {name: band for name, band in scores.items() if name not in ("mixture", "base")}
    best = max(alone, key=lambda name: alone[name].value, default=None)
    shown = {"mixture": mixture, "base": base} | ({} if best is None else {best: alone[best]})
    figures = [
        KeyFigure(name, f"{band.value:.3f}", f"right, {band.low:.3f} to {band.high:.3f}")
        for name, band in shown.items()
    ]
    figures.append(KeyFigure("prompts", f"{tested:,}", "not used as examples"))
    highest = max(band.high for name, band in shown.items() if name != "mixture")
    sentence = f"The mixture is right on {mixture.value:.3f} of the prompts, the base on "
    sentence += f"{base.value:.3f}."
    if mixture.low > highest:
        return Top(Verdict("good", sentence, "Use it as any expert."), figures)
    action = "Not shown to be better than its parts: test it on more prompts, or give more shots."
    return Top(Verdict("mixed", sentence, action), figures)


def scores_table(scores: Mapping[str, Band], tested: int) -> Table:
    """The share of right answers of each, with its interval."""
    cells = [[name, str(band)] for name, band in scores.items()]
    title = f"Right answers to {tested:,} prompts not used as examples"
    return Table(title, ["answered by", "right"], cells, right=frozenset(["right"]))


def _coefficients(mixed: FewShot) -> Section:
    """Bars for coefficients that hold everywhere, lines for those of each layer."""
    values: dict[str, Any] = {name: mixed.mixture.get(name, 0.0) for name in mixed.experts}
    depths = [len(value) for value in values.values() if not isinstance(value, float)]
    formula = "z = 1 + the sum of each coefficient times (the expert's z - 1)"
    if not depths:
        caption = f"{formula}; 0 everywhere is the base."
        return Section("The coefficients", (), (), [(signed_bars(values, "coefficient"), caption)])
    drawn = {
        name: Line(range(depths[0]), [value] * depths[0] if isinstance(value, float) else value)
        for name, value in values.items()
    }
    picture = lines(drawn, "layer", "coefficient")
    table = Table(
        "Mean coefficient over the layers",
        ["expert", "mean"],
        [[name, f"{sum(line.y) / len(line.y):.3f}"] for name, line in drawn.items()],
        right=frozenset(["mean"]),
    )
    return Section("The coefficients", (), [table], [(picture, f"{formula}, in each layer.")])


def _search(mixed: FewShot, reward: str | None) -> Section:
    result = mixed.result
    assert result is not None
    rounds = range(1, len(result.history) + 1)
    drawn = {
        "the best so far": Line(rounds, result.history),
        "base": Line(rounds, [result.start_value] * len(rounds), role="control"),
    }
    what = f"mean reward ({reward})" if reward else "log-likelihood, a token"
    caption = "How well the best mixture after each round does on the shots."
    return Section("The search", [str(result)], (), [(lines(drawn, "round", what), caption)])


def _test(scores: Mapping[str, Band], tested: int) -> Section:
    bands = {name: (band.value, band.low, band.high) for name, band in scores.items()}
    caption = f"{tested:,} prompts not used as examples, with the interval over prompts."
    roles: Roles = {"mixture": "ours"}
    picture = intervals(bands, roles, "share of right answers")
    return Section("The test", (), [scores_table(scores, tested)], [(picture, caption)])
