"""Routing between the two embedded models: [CPX] beside all other scorers.

    python -m benchmarks.routing_nano

Both models make the labels through the code behind `pliant route label`; they are cached in
benchmarks/.cache, so a second run asks for nothing again. Scorers are fitted on development
questions in two of the three wordings: they learn on one wording and choose their capacity on the
other, and calibration and threshold have their own split. They are measured on test questions, in
those two wordings and in the third, which nothing was fitted on.

In this world the text shows what makes a question hard (its family, the number of its digits), so
text scorers are strong and a tie with them is to be expected.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.harness import CACHE, keep
from pliant import nano
from pliant.reports.tables import Table
from pliant.routing.backends import ModelSpec, Settings, open_backend
from pliant.routing.goals.goal import Goal
from pliant.routing.goals.thresholds import Threshold
from pliant.routing.goals.thresholds import threshold as threshold_for
from pliant.routing.labels.grading import Grader
from pliant.routing.labels.label import label
from pliant.routing.labels.table import Model
from pliant.routing.metrics import calibration
from pliant.routing.metrics import ranking as metrics
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import Predictions, Scorer, make
from pliant.routing.scorers.cpx import Capacity, Cpx
from pliant.stats import Band, brier_skill, ece
from pliant.verify import verifier

SMALL, LARGE = nano.NAMES
SEEN, UNSEEN = (0, 1), (2,)
TEXT = ("tfidf", "text", "knn")
KINDS = ("random", "length", "group", *TEXT, "probe", "cpx")
READS_A_MODEL = ("probe", "cpx")
HALF = 2
"""Of nano-s's three layers, the early exit at about half its depth."""
FAMILY_BY_DIFFICULTY = "group"


def main(
    train: Annotated[int, typer.Option(help="Questions to learn from, in each wording.")] = 10_000,
    calibrate: Annotated[int, typer.Option(help="Questions for calibration.")] = 8_000,
    test: Annotated[int, typer.Option(help="Test questions, seen wordings and unseen.")] = 24_000,
    seed: Annotated[int, typer.Option(help="Of the scorers.")] = 0,
) -> None:
    """Print the tables and write the results."""
    console = Console(highlight=False)
    learn = [labelled("dev", train + calibrate // 2, (w,), f"dev-{w}") for w in SEEN]
    # Shuffled: the easiest questions are few, and late in the stream all of them are repeated.
    shuffled = [np.random.default_rng(seed).permutation(len(part)) for part in learn]
    fitted_on, choice = (part.select(at[:train]) for part, at in zip(learn, shuffled, strict=True))
    rest = [part.select(at[train:]) for part, at in zip(learn, shuffled, strict=True)]
    held = {
        "seen wordings": labelled("test", test, SEEN, "test-seen"),
        "unseen wording": labelled("test", test, UNSEEN, "test-unseen"),
    }
    scorers, seconds = fitted(fitted_on, choice, seed, console)
    figures: dict[str, Any] = {
        "sizes": {"learned from": len(fitted_on) + len(choice)}
        | {name: len(outcomes) for name, outcomes in held.items()},
        "fit seconds": seconds,
        "chosen": {kind: scorer.chosen() for kind, scorer in scorers.items()},
    }
    for name, outcomes in held.items():
        predictions = {k: s.predict(outcomes.prompts, outcomes.groups) for k, s in scorers.items()}
        figures[name] = measured(predictions, outcomes)
        ranking(figures[name], name).draw(console)
    figures["threshold"] = threshold(scorers["cpx"], rest, held, console)
    figures["calibration"] = calibrated(scorers["cpx"], rest, held, console)
    keep("routing_nano", figures, "python -m benchmarks.routing_nano")


# --- labels --------------------------------------------------------------------------------------


def labelled(split: str, number: int, wordings: tuple[int, ...], name: str) -> Outcomes:
    """Both models' answers to this number of questions, graded by exact match."""
    CACHE.mkdir(exist_ok=True)
    path = CACHE / f"nano-{name}-{number}.jsonl"
    if not path.is_file():
        rows = [
            {
                "prompt": q.prompt,
                "answer": q.answer,
                "group": f"{q.family}/{q.difficulty}",
                "wording": str(q.wording),
            }
            for q in nano.questions(split, number, seed=0, wordings=wordings)
        ]
        specs = [ModelSpec.parse(model) for model in (SMALL, LARGE)]
        models = [Model(spec, open_backend(spec)) for spec in specs]
        label(rows, models, Grader(verifier("exact")), path, settings=Settings(max_new_tokens=24))
    return Outcomes.read(path, models=(SMALL, LARGE))


# --- scorers -------------------------------------------------------------------------------------


def fitted(
    train: Outcomes, choice: Outcomes, seed: int, console: Console
) -> tuple[dict[str, Scorer], dict[str, float]]:
    """Every scorer, and [CPX] once more with an early exit; and the seconds to fit each."""
    scorers: dict[str, Scorer] = {}
    seconds = {}
    for kind in (*KINDS, "cpx, half way"):
        begun = time.perf_counter()
        scorer = _new(kind, scorers)
        scorers[kind] = scorer.fit(train, choice, seed)
        seconds[kind] = time.perf_counter() - begun
        console.print(f"{kind}: fitted in {seconds[kind]:.0f} s", style="dim")
    return scorers, seconds


def _new(kind: str, scorers: Mapping[str, Scorer]) -> Scorer:
    """The early exit has the capacity that was chosen for `cpx`."""
    if kind == "cpx, half way":
        cpx = scorers["cpx"]
        assert isinstance(cpx, Cpx)
        return Cpx(SMALL, [Capacity(cpx.capacity.rows, cpx.capacity.lora_rank, layer=HALF)])
    return make(kind, base=SMALL) if kind in READS_A_MODEL else make(kind)


# --- how good they are ---------------------------------------------------------------------------


def measured(predictions: Mapping[str, Predictions], outcomes: Outcomes) -> dict[str, Any]:
    """APGR of all, and [CPX] compared with each of them on the same resamples."""
    gain = {kind: each.last_gain for kind, each in predictions.items()}
    best = max(TEXT, key=lambda kind: metrics.apgr(gain[kind], outcomes))
    table = {kind: metrics.band("apgr", values, outcomes) for kind, values in gain.items()}
    within = {kind: metrics.within_group_apgr(v, outcomes) for kind, v in gain.items()}

    def more(a: str, b: str) -> dict[str, Any]:
        return metrics.difference("apgr", gain[a], gain[b], outcomes).as_dict()

    return {
        "questions": len(outcomes),
        "right": dict(zip(outcomes.models, outcomes.right.mean(axis=0).tolist(), strict=True)),
        "oracle": metrics.oracle_apgr(outcomes),
        "apgr": {kind: band.as_dict() for kind, band in table.items()},
        "within groups": within,
        "auc": {
            kind: metrics.auc(each.score, outcomes)
            for kind, each in predictions.items()
            if each.right is not None
        },
        "cpx more than": {kind: more("cpx", kind) for kind in gain if kind != "cpx"},
        "best text": best,
        "half way more than full": more("cpx, half way", "cpx"),
        "share of family by difficulty": (table["cpx"].value / table[FAMILY_BY_DIFFICULTY].value),
    }


def ranking(figures: Mapping[str, Any], name: str) -> Table:
    rows = []
    for kind, apgr in sorted(figures["apgr"].items(), key=lambda item: -item[1]["value"]):
        behind = figures["cpx more than"].get(kind)
        cpx = "-" if behind is None else _signed(behind)
        within = f"{figures['within groups'][kind]:.3f}"
        rows.append([_shown(kind), _plain(apgr), within, cpx])
    rows.append(["oracle", f"{figures['oracle']:.3f}", "-", "-"])
    head = ["scorer", "APGR (95 %)", "within groups", "cpx has more (95 %)"]
    title = f"{name}: {figures['questions']:,} test questions"
    return Table(title, head, rows, right=frozenset(head[1:]))


def _shown(kind: str) -> str:
    return "family by difficulty" if kind == FAMILY_BY_DIFFICULTY else kind


def _plain(band: Mapping[str, float]) -> str:
    return f"{band['value']:.3f} [{band['low']:.3f}, {band['high']:.3f}]"


def _signed(band: Mapping[str, float]) -> str:
    return f"{band['value']:+.3f} [{band['low']:+.3f}, {band['high']:+.3f}]"


# --- thresholds and probabilities ----------------------------------------------------------------


def threshold(
    cpx: Scorer, rest: list[Outcomes], held: Mapping[str, Outcomes], console: Console
) -> dict[str, Any]:
    """95 % of nano-l's quality, chosen on the calibration split, without and with a proof."""
    split = _both(rest)
    gain = cpx.predict(split.prompts).last_gain
    figures: dict[str, Any] = {}
    rows = []
    for confidence in (None, 0.95):
        chosen = threshold_for(Goal("quality", 0.95, confidence), gain, split)
        console.print(str(chosen), soft_wrap=True)
        results = {
            name: _result(chosen, cpx.predict(outcomes.prompts).last_gain, outcomes)
            for name, outcomes in held.items()
        }
        for name, result in results.items():
            rows.append(
                [str(chosen.goal), name, f"{result['share']:.3f}", _plain(result["of strong"])]
            )
        figures["as it is" if confidence is None else "proved"] = {
            "chosen": chosen.to_json(),
            **results,
        }
    head = ["goal", "on", "share of calls", f"of {LARGE}'s quality (95 %)"]
    Table("Thresholds", head, rows, right=frozenset(head[2:])).draw(console)
    return figures


def _result(chosen: Threshold, gain: Any, outcomes: Outcomes) -> dict[str, Any]:
    from pliant.stats import bootstrap_counts

    strong = chosen.strong(gain)
    quality = np.where(strong, outcomes.strong, outcomes.weak)
    of_strong: Band = bootstrap_counts(
        lambda counts: (counts @ quality) / (counts @ outcomes.strong), len(outcomes)
    )
    return {"share": float(strong.mean()), "of strong": of_strong.as_dict()}


def calibrated(
    cpx: Scorer, rest: list[Outcomes], held: Mapping[str, Outcomes], console: Console
) -> dict[str, Any]:
    """P(nano-s is right), before and after calibration; a constant beside it."""
    split = _both(rest)
    stated = _stated(cpx, split)
    fits = {kind: calibration.fit(kind, stated, split.weak) for kind in ("temperature", "isotonic")}
    base = float(split.weak.mean())
    figures: dict[str, Any] = {}
    rows = []
    for name, outcomes in held.items():
        raw = _stated(cpx, outcomes)
        ways = {"as it is": raw} | {kind: fit.apply(raw) for kind, fit in fits.items()}
        ways["constant"] = np.full_like(raw, base)
        figures[name] = {
            way: {
                "ece": ece(p, outcomes.weak),
                "ece, not debiased": ece(p, outcomes.weak, debias=False),
                "skill": brier_skill(p, outcomes.weak, base),
            }
            for way, p in ways.items()
        }
        for way, result in figures[name].items():
            rows.append([name, way, f"{result['ece']:.4f}", f"{result['skill']:.3f}"])
    head = ["on", "calibration", "debiased ECE", "Brier skill"]
    Table(f"P({SMALL} is right)", head, rows, right=frozenset(head[2:])).draw(console)
    return figures


def _stated(cpx: Scorer, outcomes: Outcomes) -> NDArray[np.float64]:
    right = cpx.predict(outcomes.prompts).right
    assert right is not None
    return right[:, 0]


def _both(parts: list[Outcomes]) -> Outcomes:
    from pliant.routing.scorers.linear import joined

    return joined(parts)


if __name__ == "__main__":
    typer.run(main)
