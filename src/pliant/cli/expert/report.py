"""The page of an expert's training: what it gained, how it learned, and where it acts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pliant.reports.page import KeyFigure, Section, Top, Verdict, write
from pliant.reports.palette import Role
from pliant.reports.plots import Line, Roles, heat_maps, intervals, lines
from pliant.reports.tables import Table

if TYPE_CHECKING:
    from pliant.experts.comparison import Profile
    from pliant.experts.expert import Expert
    from pliant.experts.training.controls import Controls
    from pliant.experts.training.run import ExpertResult
    from pliant.stats import Band

BINS = 20
"""Groups of singular values in a spectrum, from the largest to the smallest."""


def write_report(path: Path, folder: Path, controls: Controls) -> Path:
    """Write the page of the expert in `folder`."""
    from pliant.experts.expert import Expert

    expert = Expert.load(folder)
    sections = [_gained(folder, controls), _learned(folder), _acts(expert)]
    return write(path, f"Expert: {folder.name}", sections, _top(folder, controls))


def _top(folder: Path, controls: Controls) -> Top:
    """What was gained, and what a LoRA would, if it was compared."""
    result = controls.expert

    def interval(band: Band) -> str:
        if result.too_few_rows:
            return f"of {result.held_out} rows"
        return f"95 % interval {band.low:.3f} to {band.high:.3f}"

    figures = [
        KeyFigure("held-out reward", f"{result.after.value:.3f}", interval(result.after)),
        KeyFigure("the base", f"{result.before.value:.3f}", interval(result.before)),
        KeyFigure("gain, paired", f"{result.gain.value:+.3f}", interval(result.gain)),
        KeyFigure("trained parameters", f"{result.trained:,}", f"{result.steps:,} steps"),
    ]
    kind, action = _verdict(result, folder)
    return Top(Verdict(kind, str(result), action), figures)


def _verdict(result: ExpertResult, folder: Path) -> tuple[Literal["good", "mixed", "bad"], str]:
    """How well the training went, and what to do."""
    if result.too_few_rows:
        return "mixed", "Hold out more rows to tell what changed."
    if not result.gain.excludes(0):
        return "mixed", "Not shown to be better than the base: more steps, or an easier reward."
    if result.gain.value < 0:
        return "bad", "Do not use it: fewer steps, a smaller learning rate, or another reward."
    return "good", (
        f"Ask it: pliant expert ask --experts {folder.parent}. Other tasks may have suffered."
    )


def _role(way: str) -> Role:
    """The colour of a way to answer."""
    return "ours" if way == "expert" else "rival" if way.startswith("LoRA") else "control"


def ways_table(controls: Controls) -> Table:
    """The expert beside its controls."""
    from pliant.experts.training.controls import HEAD

    title = f"{controls.expert.held_out:,} held-out rows, greedy answers, differences paired"
    return Table(title, HEAD, controls.cells(), right=frozenset(HEAD[1:]))


def _gained(folder: Path, controls: Controls) -> Section:
    result = controls.expert
    table = Table(f"{folder.name}: the expert", ["what", "how much"], result.cells())
    bands = {way.name: (way.reward.value, way.reward.low, way.reward.high) for way in controls.ways}
    caption = (
        f"The mean reward of greedy answers to {result.held_out:,} held-out prompts, with the "
        "interval over prompts."
    )
    roles: Roles = {way.name: _role(way.name) for way in controls.ways}
    pictures = [(intervals(bands, roles, "reward"), caption)]
    sentences = [str(result), *([str(controls)] if len(controls.ways) > 2 else [])]
    return Section("What was gained", sentences, [ways_table(controls), table], pictures)


def _learned(folder: Path) -> Section:
    """Two curves of the log, for whichever was logged."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    pictures = []
    for key, what, caption in (
        ("task_reward", "reward", "The mean reward of the sampled answers."),
        ("kl", "KL, nats a token", "The distance of the sampled answers' policy from the base."),
    ):
        points = [(e["step"], e[key]) for e in entries if e.get(key) is not None and "step" in e]
        if points:
            steps, values = zip(*points, strict=True)
            pictures.append((lines({what: Line(steps, values)}, "step", what), caption))
    return Section("How it learned", (), (), pictures)


# --- where it acts -------------------------------------------------------------------------------


def _acts(expert: Expert) -> Section:
    from pliant.experts.comparison import Profile

    profile = Profile.of(expert)
    maps = heat_maps({"change of z": profile.grid()}, "projection", "change", "layer")
    spectra = _spectra(expert, profile)
    x = f"singular values, the largest first, in {BINS} groups"
    by_layer, by_projection = (
        heat_maps({"spectrum of z": _means(spectra, axis)}, name, "mean |z - 1|", x)
        for axis, name in enumerate(("layer", "projection"))
    )
    pictures = [
        (maps, "The root mean square of z - 1, by layer and projection."),
        (by_layer, "Which singular values change in each layer, over its projections."),
        (by_projection, "Which singular values of each projection change, over all layers."),
    ]
    return Section("Where it acts", [str(profile)], (), pictures)


Spectra = dict[tuple[str, str], list[list[float]]]
"""(layer, projection) -> the mean |z - 1| of each group of singular values, for each matrix."""


def _spectra(expert: Expert, profile: Profile) -> Spectra:
    spectra: Spectra = {}
    for matrix in profile.matrices:
        change: Any = expert.changes[matrix.path]
        sizes = change.abs().float().reshape(-1, change.shape[-1]).mean(0)
        values = [float(part.mean()) for part in sizes.tensor_split(BINS) if len(part)]
        layer = "-" if matrix.layer is None else str(matrix.layer)
        spectra.setdefault((layer, matrix.projection), []).append(values)
    return spectra


def _means(spectra: Spectra, axis: int) -> dict[str, Sequence[float]]:
    """The mean for each layer (0) or projection (1), over all else."""
    rows: dict[str, list[list[float]]] = {}
    for place, several in spectra.items():
        rows.setdefault(place[axis], []).extend(several)
    return {
        name: [sum(group) / len(group) for group in _columns(values)]
        for name, values in rows.items()
    }


def _columns(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Of rows that may differ in length: a matrix of a low rank has fewer groups."""
    longest = max(map(len, rows))
    return [[row[i] for row in rows if i < len(row)] for i in range(longest)]
