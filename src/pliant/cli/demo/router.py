"""The demo's second chapter: a router, trained on the spot, answers with both models."""

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
TRAINED, CALIBRATED = 3_000, 2_000


@dataclass(frozen=True)
class Turn:
    """One question and where it went."""

    prompt: str
    score: float
    gain: float
    model: str
    right: bool


@dataclass(frozen=True)
class Scoring:
    """The mean operations that scoring adds."""

    to_large: float
    """To a question for the large model: the small one has read it in vain."""
    to_small: float
    """To a question for the small model: only the token, as the answer needs the prefill too."""


@dataclass(frozen=True)
class RoutedQuestions:
    """The results of the chapter."""

    seconds: float
    """Of training, without the labelling."""
    trained: int
    """How many parameters were trained."""
    threshold: Threshold
    turns: tuple[Turn, ...]
    share: float
    quality: float
    of_large: Band
    """The quality as a share of the large model's."""
    cost: float
    """As a share of always asking the large model, scoring included."""
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


def measure(measured: TwoModels) -> RoutedQuestions:
    """Train on dev questions, choose the threshold on others, route the test questions."""
    labelled = _labelled(TRAINED + CALIBRATED, measured)
    training = labelled.select(range(TRAINED))
    calibration = labelled.select(range(TRAINED, len(labelled)))
    scorer = Cpx(SMALL, capacities=[Capacity(rows=1, lora_rank=4)])
    start = time.perf_counter()
    scorer.fit(training)
    assert scorer.scorer is not None
    seconds = time.perf_counter() - start
    rule = threshold(GOAL, scorer.predict(calibration.prompts).last_gain, calibration)
    test = _outcomes(measured.questions, measured.right, measured)
    gain = scorer.predict(test.prompts).last_gain
    large = rule.strong(gain)
    share = float(large.mean())
    scoring = _scoring(scorer, measured)
    quality = np.where(large, test.strong, test.weak)
    return RoutedQuestions(
        seconds=seconds,
        trained=sum(p.numel() for p in scorer.scorer.parameters()),
        threshold=rule,
        turns=tuple(_turns(measured.shown, scorer, rule)),
        share=share,
        quality=float(quality.mean()),
        of_large=bootstrap_counts(
            lambda counts: (counts @ quality) / (counts @ test.strong), len(test)
        ),
        cost=_cost(share, measured, scoring),
        scoring=scoring,
        apgr=metrics.band("apgr", gain, test),
        curves={
            "[CPX] router": quality_cost_curve(gain, test),
            PERFECT: quality_cost_curve(test.gain, test),
        },
    )


def _cost(share: float, measured: TwoModels, scoring: Scoring) -> float:
    """The cost of sending this share to the large model, relative to sending it everything."""
    to_large = measured.flops[LARGE] + scoring.to_large
    to_small = measured.flops[SMALL] + scoring.to_small
    return (share * to_large + (1 - share) * to_small) / measured.flops[LARGE]


def _labelled(number: int, measured: TwoModels) -> Outcomes:
    questions = nano.questions("dev", number)
    right = {name: ask_all(*nano.load(name), questions, f"labelling with {name}") for name in NAMES}
    return _outcomes(questions, right, measured)


def _outcomes(questions: Sequence[Question], right: Any, measured: TwoModels) -> Outcomes:
    return Outcomes(
        prompts=tuple(question.prompt for question in questions),
        models=NAMES,
        right=np.array([right[name] for name in NAMES], dtype=float).T,
        cost=np.tile([measured.flops[name] for name in NAMES], (len(questions), 1)),
        groups=tuple(question.family for question in questions),
        wordings=None,
        unit="flops",
    )


def _turns(shown: Sequence[Shown], scorer: Scorer, rule: Threshold) -> list[Turn]:
    predictions = scorer.predict([s.question.prompt for s in shown])
    gains = predictions.last_gain
    turns = []
    for s, score, gain, large in zip(
        shown, predictions.score, gains, rule.strong(gains), strict=True
    ):
        name = LARGE if large else SMALL
        right = s.answers[name].right
        turns.append(Turn(s.question.prompt, float(score), float(gain), name, right))
    return turns


def _scoring(scorer: Cpx, measured: TwoModels) -> Scoring:
    """Counted on the shown questions: a score alone, and a score with an answer."""
    assert scorer.scorer is not None
    model = scorer.scorer
    to_large, to_small = [], []
    for shown in track(measured.shown, "counting what scoring costs"):
        prompt = [[{"role": "user", "content": shown.question.prompt}]]
        to_large.append(counted_flops(lambda prompt=prompt: model.score(prompt)))  # type: ignore[misc]
        answered = counted_flops(
            lambda prompt=prompt: model.generate(  # type: ignore[misc]
                prompt, max_new_tokens=LONGEST_ANSWER, do_sample=False
            )
        )
        to_small.append(answered - shown.answers[SMALL].flops)
    return Scoring(sum(to_large) / len(to_large), sum(to_small) / len(to_small))


def section(measured: TwoModels, routed: RoutedQuestions) -> Section:
    """The chapter as sentences, tables and pictures."""
    return Section(
        "A router that reads the question with the small model",
        sentences=_sentences(measured, routed),
        tables=(turns_table(routed),),
        pictures=((_picture(measured, routed), "Quality against cost, on the test questions."),),
    )


def _sentences(measured: TwoModels, routed: RoutedQuestions) -> tuple[str, ...]:
    large = measured.share(LARGE)
    to_large = routed.scoring.to_large / measured.flops[LARGE]
    to_small = routed.scoring.to_small / measured.flops[LARGE]
    return (
        f"A [CPX] token after the question was trained on {TRAINED:,} labelled questions in "
        f"{routed.seconds:.0f} s: {routed.trained:,} parameters, while {SMALL} itself does not "
        f"change. The goal: {GOAL}; the threshold was chosen on {CALIBRATED:,} other questions.",
        f"On the {len(measured.questions):,} test questions it gets {routed.quality:.0%} right "
        f"and sends {routed.share:.0%} of them to {LARGE}, which alone gets {large:.0%}. That is "
        f"{routed.of_large.value:.0%} of its quality (95 % confidence: {routed.of_large.low:.0%} "
        f"to {routed.of_large.high:.0%}) for {routed.cost:.0%} of its cost, scoring included: "
        f"{to_large:.0%} for a question that goes to {LARGE}, which {SMALL} has read in vain, and "
        f"{to_small:.0%} for one that {SMALL} answers.",
        f"APGR, the share of the difference between the models that it recovers, averaged over "
        f"all budgets (chance .5): {routed.apgr.value:.2f} (95 % confidence: "
        f"{routed.apgr.low:.2f} to {routed.apgr.high:.2f}).",
    )


def turns_table(routed: RoutedQuestions) -> Table:
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


def _picture(measured: TwoModels, routed: RoutedQuestions) -> str:
    """Each curve from the small model alone to the large one; scoring shifts ours to the right."""
    nothing = Scoring(0, 0)
    small = (_cost(0, measured, nothing), measured.share(SMALL))
    large = (1.0, measured.share(LARGE))
    lines = {"random": [small, large]}
    for name, curve in routed.curves.items():
        scoring = nothing if name == PERFECT else routed.scoring
        points = zip(curve.share, curve.quality, strict=True)
        lines[name] = [(_cost(share, measured, scoring), quality) for share, quality in points]
    marks = {SMALL: small, LARGE: large, "chosen": (routed.cost, routed.quality)}
    return plots.curve(lines, marks, f"cost (1 = always {LARGE})", "accuracy")
