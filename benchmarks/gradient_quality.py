"""How close each rule's gradient is to the full gradient, and which default is best.

    python -m benchmarks.gradient_quality [--data FOLDER] [--quick]

Rules, scores, mixes, engines, `kv_grad` and ratios, one at a time around the default, on six models
and texts: untrained, trained, trained longer on bytes, trained with a large vocabulary (with scores
from an eighth of it), the embedded model on its own questions, and instructions. It reports each
draw's cosine with the full gradient, with bands from resampled batches. Differences from sparse
uniform and from the default are paired, batch by batch and draw by draw. FOLDER holds
`gsm8k-train.jsonl.gz` and `gsm8k-test.jsonl.gz`; without it, instructions are functions of the
standard library.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import gradient_material as material
from benchmarks.gradient_race import command_line
from benchmarks.harness import keep
from pliant import nano
from pliant.gradients import GradientConfig
from pliant.gradients.audit.contenders import STANDARD, Contender, Field, restored
from pliant.gradients.audit.step import GradientComparison
from pliant.gradients.config import Score
from pliant.gradients.selection.vocabulary_sample import MINIMUM
from pliant.stats import Band, bootstrap

DEFAULT = GradientConfig(ratio=0.25, selection="sampled", score="gradient", mix=0.2)
"""Written out, so that the figures stay valid when the package's default changes."""
SCORES: tuple[Score, ...] = ("gradient", "loss", "entropy", "margin", "combined", "doubt")
MIXES = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Setting:
    """A model and its batches."""

    name: str
    model: Any
    batches: list[dict[str, torch.Tensor]]


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    for setting in settings(options):
        figures[setting.name] = measured(setting, options.draws)
        show(setting.name, figures[setting.name])
    complete = list(options.settings) == list(SETTINGS)
    name = "gradient_quality" if complete else f"gradient_quality_{_plain(options.settings[0])}"
    keep(name, figures, " ".join(["python -m benchmarks.gradient_quality", *command_line()]))


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    for name in options.settings:
        model, rows, size = SETTINGS[name](options)
        yield Setting(name, model, list(islice(rows.batches(size, 1), options.batches)))


def unseen(text: material.Material) -> material.Material:
    """The held-out rows alone: a trained model has not seen them."""
    return material.Material(text.held, text.held)


def own_questions(options: argparse.Namespace) -> material.Material:
    """Questions of the kinds that the embedded models were trained on."""
    families = [family.name for family in nano.TRAINED]
    return material.questions(16 * options.batches, 1, families=families)


SETTINGS: dict[str, Callable[[argparse.Namespace], tuple[Any, material.Material, int]]] = {
    "trained": lambda o: (material.pretrained(300), unseen(material.source(96)), 8),
    "instructions": lambda o: (
        material.pretrained(300),
        material.instructions(o.data, 256),
        4,
    ),
    "nano-s, own questions": lambda o: (nano.load("nano-s")[0], own_questions(o), 16),
    "untrained": lambda o: (material.fresh(0), unseen(material.source(96)), 8),
    "trained longer, bytes": lambda o: (
        material.pretrained(600, 256, 96, 4),
        unseen(material.source(128, 256)),
        8,
    ),
    "trained, 8192 words": lambda o: (
        material.pretrained(600, 8192),
        unseen(material.source(96, 8192)),
        8,
    ),
}
"""A model, its data, and the rows of a batch."""


def contenders(vocabulary: int) -> list[Contender]:
    """One change at a time; scores and mixes are crossed."""
    exact = replace(DEFAULT, engine="exact")
    uniform = replace(DEFAULT, selection="uniform")
    configs = [
        DEFAULT,
        uniform,
        *(replace(DEFAULT, score=score, mix=mix) for score in SCORES for mix in MIXES),
        *(replace(DEFAULT, selection=rule) for rule in ("topk", "stratified", "sequence_aware")),
        replace(DEFAULT, kv_grad="one_hop"),
        replace(uniform, kv_grad="one_hop"),
        *(replace(exact, mix=mix) for mix in MIXES),
        replace(exact, score="loss"),
        *(
            replace(exact, selection=rule)
            for rule in ("uniform", "topk", "stratified", "sequence_aware")
        ),
        *(
            replace(config, ratio=0.1)
            for config in (
                DEFAULT,
                uniform,
                replace(DEFAULT, score="loss"),
                exact,
                replace(exact, selection="uniform"),
            )
        ),
    ]
    if vocabulary > MINIMUM:
        configs += [replace(config, score_share=1.0) for config in (DEFAULT, exact)]
    tokens = [Contender("tokens", config) for config in dict.fromkeys(configs)]
    rows = [Contender("rows", share=0.25), Contender("rows", share=0.5)]
    return [*tokens, *rows, Contender("hardest_rows", share=0.25), STANDARD]


def measured(setting: Setting, draws: int) -> dict[str, Any]:
    field_contenders = contenders(setting.model.config.vocab_size)
    with restored(setting.model), Field(setting.model, field_contenders) as field:
        comparison = GradientComparison(field, draws)
        for batch in track(setting.batches, setting.name):
            comparison.add(batch)
        notes = {c.name: field.notes[c] for c in field_contenders if field.notes.get(c)}
    uniform = Contender("tokens", replace(DEFAULT, selection="uniform"))
    default = Contender("tokens", DEFAULT)
    figures = {}
    for contender in field_contenders:
        quality = asdict(comparison.quality(contender))
        figures[contender.name] = quality | {
            "cosine": comparison.quality(contender).cosine.as_dict(),
            "above_uniform": above(comparison, contender, uniform).as_dict(),
            "above_default": above(comparison, contender, default).as_dict(),
        }
    return {
        "sequences": sum(len(batch["input_ids"]) for batch in setting.batches),
        "tokens": sum(int((b["labels"][:, 1:] != material.IGNORED).sum()) for b in setting.batches),
        "batches": len(setting.batches),
        "draws": draws,
        "rules": figures,
        "notes": notes,
    }


def above(comparison: GradientComparison, ours: Contender, theirs: Contender) -> Band:
    """The difference of cosines, averaged over the draws of a batch and paired by batch."""
    differences = np.array(
        [
            np.mean(a.cosines) - np.mean(b.cosines)
            for a, b in zip(comparison.results[ours], comparison.results[theirs], strict=True)
        ]
    )
    return bootstrap(lambda at: float(differences[at].mean()), len(differences), resamples=2000)


def show(name: str, figures: dict[str, Any]) -> None:
    table = Table(title=f"{name}: {figures['batches']} batches, {figures['draws']} draws")
    for column in ("", "cosine", "above uniform", "above default", "norm", "bias", "variance"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for rule, values in figures["rules"].items():
        bands = (_band(values[key]) for key in ("cosine", "above_uniform", "above_default"))
        rest = (f"{values[key]:.3f}" for key in ("norm", "bias", "variance"))
        table.add_row(rule, *bands, *rest)
    Console(width=160).print(table)


def _band(band: dict[str, float]) -> str:
    return f"{band['value']:.3f} [{band['low']:.3f}, {band['high']:.3f}]"


def _plain(name: str) -> str:
    return "_".join(name.replace(",", "").split())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder with gsm8k-train.jsonl.gz")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--quick", action="store_true", help="the untrained model alone, 2 x 2")
    options = parser.parse_args()
    if options.quick:
        options.settings, options.batches, options.draws = ["untrained"], 2, 2
    return options


if __name__ == "__main__":
    main()
