"""The demo's second chapter: a router, trained on the spot, answers with both models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from pliant import nano
from pliant.cli.demo.size import Size
from pliant.cli.demo.two_models import (
    LARGE,
    SHOWN_FIRST,
    SMALL,
    Shown,
    TwoModels,
    ask_all,
    counted_flops,
)
from pliant.cli.terminal import track
from pliant.nano import NAMES, Question
from pliant.reports import plots
from pliant.reports.page import KeyFigure, Section, Top, Verdict
from pliant.reports.palette import Role
from pliant.reports.plots import Line
from pliant.reports.tables import Table
from pliant.routing.goals.thresholds import Threshold, threshold
from pliant.routing.metrics import ranking as metrics
from pliant.routing.metrics.curves import Curve, quality_cost_curve
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import Scorer, make
from pliant.routing.scorers.cpx import Capacity, Cpx
from pliant.stats import Band, bootstrap_counts

GOAL = "95 % of the large model's quality, with 90 % confidence"
PERFECT, RIVAL, OURS = "perfect", "text", "[CPX]"
LONGEST_ANSWER = 24  # tokens


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


FREE = Scoring(0, 0)
"""Of a scorer that reads the text alone."""


@dataclass(frozen=True)
class Routed:
    """What one scorer makes of the test questions at its own threshold."""

    share: float
    """Of the questions that go to the large model."""
    quality: float
    of_large: Band
    """The quality as a share of the large model's."""
    cost: float
    """As a share of always asking the large model, scoring included."""
    apgr: Band
    curve: Curve


@dataclass(frozen=True)
class RoutedQuestions:
    """The results of the chapter."""

    size: Size
    seconds: float
    """Of training, without the labelling."""
    parameters: int
    """How many were trained."""
    goal: str
    turns: tuple[Turn, ...]
    scoring: Scoring
    ours: Routed
    rival: Routed
    """The scorer that reads the text alone."""
    ahead: Band
    """How much more often we are right than the rival is at the same total cost."""
    perfect: Curve

    def as_dict(self) -> dict[str, object]:
        """For JSON: without the curves."""
        return {
            "goal": self.goal,
            "trained": self.parameters,
            **_figures(self.ours),
            "text": _figures(self.rival),
            "ahead_of_text_at_equal_cost": self.ahead.as_dict(),
            "turns": [asdict(turn) for turn in self.turns],
        }


def _figures(routed: Routed) -> dict[str, object]:
    return {
        "share": routed.share,
        "accuracy": routed.quality,
        "of_large": routed.of_large.as_dict(),
        "cost": routed.cost,
        "apgr": routed.apgr.as_dict(),
    }


def measure(measured: TwoModels, size: Size) -> RoutedQuestions:
    """Train on dev questions, choose the threshold on others, route the test questions."""
    labelled = _labelled(size.trained + size.calibrated, measured)
    training = labelled.select(range(size.trained))
    calibration = labelled.select(range(size.trained, len(labelled)))
    scorer = Cpx(SMALL, capacities=[Capacity(rows=1, lora_rank=4)])
    start = time.perf_counter()
    scorer.fit(training)
    assert scorer.scorer is not None
    seconds = time.perf_counter() - start
    text = make(RIVAL).fit(training)
    scoring = _scoring(scorer, measured)
    test = _outcomes(measured.questions, measured.right, measured)
    rule = _rule(scorer, calibration)
    ours = _routed(scorer, rule, test, measured, scoring)
    rival = _routed(text, _rule(text, calibration), test, measured, FREE)
    return RoutedQuestions(
        size=size,
        seconds=seconds,
        parameters=sum(p.numel() for p in scorer.scorer.parameters()),
        goal=str(rule.goal),
        turns=tuple(_turns(measured.shown, scorer, rule)),
        scoring=scoring,
        ours=ours,
        rival=rival,
        ahead=_ahead(scorer, rule, text, test, _free_share(ours.cost, measured)),
        perfect=quality_cost_curve(test.gain, test),
    )


def _rule(scorer: Scorer, calibration: Outcomes) -> Threshold:
    return threshold(GOAL, scorer.predict(calibration.prompts).last_gain, calibration)


def _routed(
    scorer: Scorer, rule: Threshold, test: Outcomes, measured: TwoModels, scoring: Scoring
) -> Routed:
    gain = scorer.predict(test.prompts).last_gain
    large = rule.strong(gain)
    share = float(large.mean())
    quality = np.where(large, test.strong, test.weak)
    return Routed(
        share=share,
        quality=float(quality.mean()),
        of_large=bootstrap_counts(
            lambda counts: (counts @ quality) / (counts @ test.strong), len(test)
        ),
        cost=_cost(share, measured, scoring),
        apgr=metrics.band("apgr", gain, test),
        curve=quality_cost_curve(gain, test),
    )


def _ahead(scorer: Scorer, rule: Threshold, text: Scorer, test: Outcomes, share: float) -> Band:
    """Against the text scorer that sends `share` of the questions to the large model."""
    ours = np.where(rule.strong(scorer.predict(test.prompts).last_gain), test.strong, test.weak)
    order = np.argsort(-text.predict(test.prompts).last_gain, kind="stable")
    large = np.zeros(len(test), dtype=bool)
    large[order[: round(share * len(test))]] = True
    more = ours - np.where(large, test.strong, test.weak)
    return bootstrap_counts(lambda counts: (counts @ more) / counts.sum(-1), len(test))


def _free_share(cost: float, measured: TwoModels) -> float:
    """The share of calls of the large model that this cost buys if scoring is free."""
    none, every = _cost(0, measured, FREE), _cost(1, measured, FREE)
    return min(1.0, max(0.0, (cost - none) / (every - none)))


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


def top(routed: RoutedQuestions) -> Top:
    """Of the demo's page: what a router keeps and saves, and whether its rival does better."""
    ours, rival = routed.ours, routed.rival
    kind: Literal["good", "mixed"] = "good" if routed.ahead.low > 0 else "mixed"
    sentence = (
        f"A router between the two models keeps {ours.of_large.value:.0%} of {LARGE}'s quality at "
        f"{ours.cost:.0%} of its cost; one that reads the words alone {rival.of_large.value:.0%} "
        f"at {rival.cost:.0%}."
    )
    figure = KeyFigure(
        "a router keeps",
        f"{ours.of_large.value:.0%}",
        f"of {LARGE}'s quality, {ours.of_large.low:.0%} to {ours.of_large.high:.0%}, at "
        f"{ours.cost:.0%} of its cost",
    )
    return Top(Verdict(kind, sentence, "With models of your own: pliant doctor MODEL."), [figure])


def section(measured: TwoModels, routed: RoutedQuestions) -> Section:
    """The chapter as sentences, tables and pictures."""
    return Section(
        "A router that reads the question with the small model",
        sentences=_sentences(measured, routed),
        tables=(rivals_table(measured, routed), turns_table(routed)),
        pictures=((_picture(measured, routed), "Quality against cost, on the test questions."),),
    )


def _sentences(measured: TwoModels, routed: RoutedQuestions) -> tuple[str, ...]:
    ours, rival, size = routed.ours, routed.rival, routed.size
    to_large = routed.scoring.to_large / measured.flops[LARGE]
    to_small = routed.scoring.to_small / measured.flops[LARGE]
    return (
        f"A [CPX] token after the question was trained on {size.trained:,} labelled questions in "
        f"{routed.seconds:.0f} s: {routed.parameters:,} parameters, while {SMALL} itself does not "
        f"change. The goal: {GOAL}; the threshold was chosen on {size.calibrated:,} other "
        "questions.",
        f"On the {len(measured.questions):,} test questions the router gets {ours.quality:.0%} "
        f"right and sends {ours.share:.0%} of them to {LARGE}, which alone gets "
        f"{measured.share(LARGE):.0%} right. That is {_percent(ours.of_large)} of its quality for "
        f"{ours.cost:.0%} of its cost. Scoring is in that cost: {to_large:.0%} for a question that "
        f"goes to {LARGE}, which {SMALL} has read in vain, and {to_small:.0%} for one that {SMALL} "
        "answers.",
        f"Its rival, `{RIVAL}`, reads the question's words alone, which costs next to nothing. "
        f"For the same goal it keeps {_percent(rival.of_large)} of the quality for "
        f"{rival.cost:.0%} of the cost. At the same total cost as the [CPX] router it is right "
        f"{_than_ours(routed.ahead)}. A reading by {SMALL} costs {to_large:.0%} of an answer by "
        f"{LARGE}: the cheaper it is beside the large model's answer, the better for [CPX].",
    )


def _percent(band: Band) -> str:
    return f"{band.value:.0%} [{band.low:.0%}, {band.high:.0%}]"


def _than_ours(ahead: Band) -> str:
    interval = f"{100 * ahead.value:+.1f} points for [CPX], 95 % interval "
    interval += f"{100 * ahead.low:+.1f} to {100 * ahead.high:+.1f}"
    if not ahead.excludes(0):
        return f"about as often ({interval}): the difference is within chance"
    return f"{'less' if ahead.value > 0 else 'more'} often ({interval})"


def rivals_table(measured: TwoModels, routed: RoutedQuestions) -> Table:
    """Both scorers between the two models."""
    scorers = {"[CPX], reads with nano-s": routed.ours, f"{RIVAL}, reads the words": routed.rival}
    small = f"{_cost(0, measured, FREE):.0%}"
    rows = [
        [f"always {SMALL}", "0%", f"{measured.share(SMALL):.2f}", small, "-"],
        *(
            [name, f"{each.share:.0%}", f"{each.quality:.2f}", f"{each.cost:.0%}", str(each.apgr)]
            for name, each in scorers.items()
        ),
        [f"always {LARGE}", "100%", f"{measured.share(LARGE):.2f}", "100%", "-"],
    ]
    head = ["router", f"to {LARGE}", "right", "cost", "APGR (chance .5)"]
    return Table("The router, its rival, and no router", head, rows, right=frozenset(head[1:]))


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
        shown=SHOWN_FIRST,
    )


def _picture(measured: TwoModels, routed: RoutedQuestions) -> str:
    small = (_cost(0, measured, FREE), measured.share(SMALL))
    ends = {SMALL: small, LARGE: (1.0, measured.share(LARGE))}
    chosen = ("chosen", (routed.ours.cost, routed.ours.quality))
    drawn, x = lines(measured, routed), f"cost (1 = always {LARGE})"
    return plots.lines(drawn, x, "share of right answers", ends, chosen)


def lines(measured: TwoModels, routed: RoutedQuestions) -> dict[str, Line]:
    """Quality against cost, from the small model alone to the large one; scoring shifts ours to
    the right."""
    small = (_cost(0, measured, FREE), measured.share(SMALL))
    curves: tuple[tuple[str, Curve, Scoring, Role], ...] = (
        ("[CPX] router", routed.ours.curve, routed.scoring, "ours"),
        (RIVAL, routed.rival.curve, FREE, "rival"),
        (PERFECT, routed.perfect, FREE, "bound"),
    )
    drawn = {"random": Line.through([small, (1.0, measured.share(LARGE))], "control")}
    for name, curve, scoring, role in curves:
        cost = [_cost(share, measured, scoring) for share in curve.share]
        drawn[name] = Line(cost, curve.quality.tolist(), role=role)
    return drawn
