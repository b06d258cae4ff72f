"""The page of an expert's training: how it learned, what it gained, and where it acts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.reports.page import Section, write
from pliant.reports.plots import Line, bars, heat_maps, lines
from pliant.reports.tables import Table

if TYPE_CHECKING:
    from pliant.experts.expert import Expert
    from pliant.experts.training.run import ExpertResult

BINS = 20
"""Points of the spectrum, from the largest singular values to the smallest."""


def write_report(path: Path, folder: Path, result: ExpertResult) -> Path:
    """Write the page of the expert in `folder`."""
    from pliant.experts.expert import Expert

    expert = Expert.load(folder)
    sections = [_gained(folder, result), _learned(folder), _acts(expert)]
    return write(path, f"Expert: {folder.name}", sections)


def _gained(folder: Path, result: ExpertResult) -> Section:
    table = Table(f"{folder.name}: the expert", ["what", "how much"], result.cells())
    series = {"base": [result.before.value], "with the expert": [result.after.value]}
    caption = f"The reward of greedy answers to {result.held_out:,} held-out prompts."
    pictures = [(bars(["held-out prompts"], series, "", "reward"), caption)]
    return Section("What was gained", [str(result)], [table], pictures)


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


def _acts(expert: Expert) -> Section:
    from pliant.experts.comparison import Profile

    profile = Profile.of(expert)
    maps = heat_maps({"change of z": profile.grid()}, "projection", "change", "layer")
    spectrum = lines(
        {kind: Line(range(BINS), values) for kind, values in _spectrum(expert).items()},
        f"singular values, the largest first, in {BINS} groups",
        "mean |z - 1|",
    )
    pictures = [
        (maps, "The root mean square of z - 1, by layer and projection."),
        (spectrum, "How much the singular values of each projection change, over all layers."),
    ]
    return Section("Where it acts", [str(profile)], (), pictures)


def _spectrum(expert: Expert) -> dict[str, list[float]]:
    """The mean change of each group of singular values, by the projection's name."""
    groups: dict[str, list[Any]] = {}
    for path, change in expert.changes.items():
        own = change.abs().float().reshape(-1, change.shape[-1]).mean(0)
        parts = own.tensor_split(BINS)
        values = [float(part.mean()) if len(part) else 0.0 for part in parts]
        groups.setdefault(path.rpartition(".")[2], []).append(values)
    return {
        kind: [sum(column) / len(column) for column in zip(*rows, strict=True)]
        for kind, rows in groups.items()
    }
