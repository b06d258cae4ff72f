"""The demo's second chapter: a router is trained on the spot, and answers for both models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pliant import nano
from pliant.cli.demo.two_models import LARGE, SMALL, Shown, TwoModels, ask_all, counted_flops
from pliant.cli.terminal import track
from pliant.nano import NAMES, Question
from pliant.reports import plots
from pliant.reports.page import Section
from pliant.reports.tables import Table
from pliant.routing.goals.thresholds import Threshold, threshold
from pliant.routing.metrics import ranking as metrics
from pliant.routing.metrics.curves import Curve, quality_cost_curve
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import Scorer
from pliant.routing.scorers.cpx import Capacity, Cpx
from pliant.stats import Band, bootstrap_counts

GOAL = "95 % of the large model's quality, with 90 % confidence"
PERFECT = "perfect"
LONGEST_ANSWER = 24  # tokens
LEARNED, CALIBRATED = 3_000, 2_000


@dataclass(frozen=True)
class Turn:
    """One question on its way."""

    prompt: str
    score: float
    gain: float
    model: str
    right: bool


@dataclass(frozen=True)
class Scoring:
    """The mean operations that a score adds."""

    leaving: float
    """To a question that goes to the large model: the small one has read it in vain."""
    staying: float
    """To one that the small model answers: the prefill is the answer's own, so only the token."""


@dataclass(frozen=True)
class Routed:
    """What the chapter found."""

    seconds: float
    """Of training, once the labels were there."""
    trained: int
    """Numbers that were trained."""
    threshold: Threshold
    turns: tuple[Turn, ...]
    share: float
    quality: float
    of_large: Band
    """The quality as a share of the large model's."""
    cost: float
    """As a share of always asking the large model, scoring counted in."""
    scoring: Scoring
    apgr: Band
    curves: dict[str, Curve]

    def as_dict(self) -> dict[str, object]:
        """For JSON: without the curves."""
        return {
            "goal": str(self.threshold.goal),
            "trained": self.trained,
            "share": self.share,
            "accuracy": self.quality,
            "of_large": self.of_large.as_dict(),
            "cost": self.cost,
            "apgr": self.apgr.as_dict(),
            "turns": [asdict(turn) for turn in self.turns],
        }


def measure(found: TwoModels) -> Routed:
    """Train on development questions, choose the threshold on others, route the test questions."""
    labelled = _labelled(LEARNED + CALIBRATED, found)
    lessons = labelled.select(range(LEARNED))
    calibration = labelled.select(range(LEARNED, len(labelled)))
    scorer = Cpx(SMALL, capacities=[Capacity(rows=1, lora_rank=4)])
    begun = time.perf_counter()
    scorer.fit(lessons)
    assert scorer.scorer is not None
    seconds = time.perf_counter() - begun
    limit = threshold(GOAL, scorer.predict(calibration.prompts).last_gain, calibration)
    test = _outcomes(found.asked, found.right, found)
    gain = scorer.predict(test.prompts).last_gain
    large = limit.strong(gain)
    share = float(large.mean())
    scoring = _scoring(scorer, found)
    quality = np.where(large, test.strong, test.weak)
    return Routed(
        seconds=seconds,
        trained=sum(p.numel() for p in scorer.scorer.parameters()),
        threshold=limit,
        turns=tuple(_turns(found.shown, scorer, limit)),
        share=share,
        quality=float(quality.mean()),
        of_large=bootstrap_counts(
            lambda counts: (counts @ quality) / (counts @ test.strong), len(test)
        ),
        cost=_cost(share, found, scoring),
        scoring=scoring,
        apgr=metrics.band("apgr", gain, test),
        curves={
            "[CPX] router": quality_cost_curve(gain, test),
            PERFECT: quality_cost_curve(test.gain, test),
        },
    )


def _cost(share: float, found: TwoModels, scoring: Scoring) -> float:
    """Of sending this share to the large model, as a share of sending it everything."""
    leaving, staying = found.flops[LARGE] + scoring.leaving, found.flops[SMALL] + scoring.staying
    return (share * leaving + (1 - share) * staying) / found.flops[LARGE]


def _labelled(number: int, found: TwoModels) -> Outcomes:
    asked = nano.questions("dev", number)
    right = {name: ask_all(*nano.load(name), asked, f"labelling with {name}") for name in NAMES}
    return _outcomes(asked, right, found)


def _outcomes(asked: Sequence[Question], right: Any, found: TwoModels) -> Outcomes:
    return Outcomes(
        prompts=tuple(question.prompt for question in asked),
        models=NAMES,
        right=np.array([right[name] for name in NAMES], dtype=float).T,
        cost=np.tile([found.flops[name] for name in NAMES], (len(asked), 1)),
        groups=tuple(question.family for question in asked),
        wordings=None,
        unit="flops",
    )


def _turns(shown: Sequence[Shown], scorer: Scorer, limit: Threshold) -> list[Turn]:
    said = scorer.predict([s.question.prompt for s in shown])
    turns = []
    for i, large in enumerate(limit.strong(said.last_gain)):
        name = LARGE if large else SMALL
        turns.append(
            Turn(
                shown[i].question.prompt,
                float(said.score[i]),
                float(said.last_gain[i]),
                name,
                shown[i].answers[name].right,
            )
        )
    return turns


def _scoring(scorer: Cpx, found: TwoModels) -> Scoring:
    """Counted on the shown questions: asked for a score alone, and while it answers."""
    assert scorer.scorer is not None
    model = scorer.scorer
    leaving, staying = [], []
    for shown in track(found.shown, "counting what scoring costs"):
        asked = [[{"role": "user", "content": shown.question.prompt}]]
        leaving.append(counted_flops(lambda asked=asked: model.score(asked)))  # type: ignore[misc]
        answered = counted_flops(
            lambda asked=asked: model.generate(  # type: ignore[misc]
                asked, max_new_tokens=LONGEST_ANSWER, do_sample=False
            )
        )
        staying.append(answered - shown.answers[SMALL].flops)
    return Scoring(sum(leaving) / len(leaving), sum(staying) / len(staying))


def section(found: TwoModels, routed: Routed) -> Section:
    """The chapter as sentences, tables and pictures."""
    return Section(
        "A router that reads the question with the small model",
        sentences=_sentences(found, routed),
        tables=(turns_table(routed),),
        pictures=((_picture(found, routed), "Quality against cost, on the test questions."),),
    )


def _sentences(found: TwoModels, routed: Routed) -> tuple[str, ...]:
    large = found.share(LARGE)
    leaving = routed.scoring.leaving / found.flops[LARGE]
    staying = routed.scoring.staying / found.flops[LARGE]
    return (
        f"A [CPX] token behind the question was trained on {LEARNED:,} labelled questions in "
        f"{routed.seconds:.0f} s: {routed.trained:,} numbers, beside a {SMALL} that stays as it "
        f"is. The goal: {GOAL}; the threshold was chosen on {CALIBRATED:,} other questions.",
        f"On the {len(found.asked):,} test questions it gets {routed.quality:.0%} right "
        f"and sends {routed.share:.0%} of them to {LARGE}, which alone gets {large:.0%}. That is "
        f"{routed.of_large.value:.0%} of its quality (95 % confidence: {routed.of_large.low:.0%} "
        f"to {routed.of_large.high:.0%}) for {routed.cost:.0%} of its cost, scoring counted in: "
        f"{leaving:.0%} for a question that leaves, which {SMALL} has read in vain, {staying:.0%} "
        "for one that stays.",
        f"APGR, the share of the gain between the models that it brings on average over all "
        f"budgets (chance .5): {routed.apgr.value:.2f}, with 95 % confidence "
        f"{routed.apgr.low:.2f} to {routed.apgr.high:.2f}.",
    )


def turns_table(routed: Routed) -> Table:
    rows = [
        [t.prompt, f"{t.score:.2f}", f"{t.gain:+.2f}", t.model, "✓ right" if t.right else "✗"]
        for t in routed.turns
    ]
    head = ["question", "score", "gain", "goes to", "and is"]
    return Table(
        f"Where each question goes (score: how hard for {SMALL}; gain: of asking {LARGE})",
        head,
        rows,
        right=frozenset(["score", "gain"]),
        colours={"✓ right": "green", "✗": "red"},
    )


def _picture(found: TwoModels, routed: Routed) -> str:
    """Each curve from the small model alone to the large one alone; scoring moves ours right."""
    nothing = Scoring(0, 0)
    small, large = (_cost(0, found, nothing), found.share(SMALL)), (1.0, found.share(LARGE))
    lines = {"random": [small, large]}
    for name, curve in routed.curves.items():
        scoring = nothing if name == PERFECT else routed.scoring
        points = zip(curve.share, curve.quality, strict=True)
        lines[name] = [(_cost(share, found, scoring), quality) for share, quality in points]
    marks = {SMALL: small, LARGE: large, "chosen": (routed.cost, routed.quality)}
    return plots.curve(lines, marks, f"cost (1 = always {LARGE})", "accuracy")
