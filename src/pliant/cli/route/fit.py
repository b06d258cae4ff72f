"""From labels to a router and its figures: `pliant route fit`, `calibrate` and `evaluate`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le

from pliant.cli import terminal
from pliant.cli.route import LabelsOptions, RouterOptions
from pliant.errors import InvalidInput
from pliant.options import Flag

if TYPE_CHECKING:
    from pliant.routing.fitting.calibrating import Calibrated
    from pliant.routing.fitting.evaluation import Evaluation
    from pliant.routing.fitting.fit import Fitted
    from pliant.routing.prompts import Prompt

Calibration = Literal["platt", "temperature", "isotonic"]


@dataclass(frozen=True, kw_only=True)
class FitOptions(LabelsOptions):
    labels: str
    """The labels that `pliant route label` wrote, or another table."""
    out: Path
    """The router's folder."""
    ladder: bool = False
    """Try text+group, too, which otherwise needs --groups-known."""
    scorer: tuple[str, ...] = ()
    """Try this scorer; repeatable. One of your own is my_module:Mine, or mine.py:Mine."""
    base: str | None = None
    """The model that the scorers cpx and probe read, usually the small one."""
    encoder: str | None = None
    """The text encoder that the scorers embed and text+embed read, such as minilm; with it
    text+embed is the preferred scorer."""
    goal: str | None = None
    """In words. Default: 95 % of the large model's quality, with 80 % confidence; or, if that
    costs no more than the others, whichever model is likelier right."""
    lam: Annotated[float, Ge(0)] | None = None
    """Instead of a goal: how much quality a unit of cost is worth."""
    calibration: Calibration = "platt"
    """How scores become probabilities."""
    backend: Annotated[tuple[str, ...], Flag(metavar="MODEL=BACKEND")] = ()
    """Where a model is served, if its name does not tell; repeatable."""
    groups_known: bool = False
    """The group of each prompt will be known when it is routed: text+group is preferred then."""
    force: bool = False
    """Write the router even if it saves nothing."""
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] = 0
    """Seed of the splits and of the training."""

    def __post_init__(self) -> None:
        if self.goal is not None and self.lam is not None:
            raise InvalidInput("--goal and --lam both set the threshold: give one of them")
        if self.ladder and self.scorer:
            raise InvalidInput("--ladder tries every scorer: leave --scorer out, or --ladder")


def fit(options: FitOptions) -> None:
    """Fit a router: try scorers, select one, set its threshold.

    Needs 50 labels. A part of them measures the router; cross-validation over the others selects
    the scorer and sets the threshold. The first line says whether the router pays. One that saves
    nothing is not written without --force: its figures are shown, and the exit code is 2.

    Ctrl-C leaves no half-written router: the folder keeps what it held before.

    Example: pliant route fit --labels labels.jsonl --out my-router --base nano-s
    """
    from pliant.routing.fitting.verdict import SavesNothing

    refused: SavesNothing | None = None
    try:
        fitted = _fitted(options)
    except SavesNothing as error:
        fitted, refused = error.fitted, error
    if options.json:
        terminal.print_json({**fitted.as_dict(), "written": refused is None})
    else:
        _draw(fitted, options, written=refused is None)
    if refused is not None:
        raise refused


def _fitted(options: FitOptions) -> Fitted:
    """The router, with the models and the cost that the labels' rows record."""
    from pliant import route

    backends = dict(_pair(text) for text in options.backend)
    terminal.hide_loading_bars()
    return route.fit(
        options.labels,
        options.out,
        models=options.model,
        columns=options.columns,
        scorers=list(options.scorer) or None,
        base=options.base,
        encoder=options.encoder,
        goal=options.goal,
        lam=options.lam,
        calibrate_by=options.calibration,
        backends=backends,
        groups_known=options.groups_known,
        every=options.ladder,
        force=options.force,
        seed=options.seed,
        progress=terminal.track,
    )


def _pair(text: str) -> tuple[str, str]:
    name, equals, backend = text.partition("=")
    if not (name and equals and backend):
        raise InvalidInput(f"--backend {text!r}: write it as MODEL=BACKEND")
    return name, backend


def _draw(fitted: Fitted, options: FitOptions, written: bool) -> None:
    from pliant.cli.route import tables
    from pliant.routing.fitting.ladder import apgr_defined
    from pliant.routing.metrics.ranking import oracle_apgr

    names, evaluation, learn = fitted.file.names, fitted.evaluation, fitted.splits.learn
    highest = oracle_apgr(learn) if apgr_defined(learn) else None
    table = tables.ladder(fitted.ladder, names, fitted.selected.kind, highest)
    sizes, how = fitted.splits.sizes(), fitted.splits.how
    measure = evaluation.report
    worth, possible = "", measure.oracle_apgr
    if measure.ranked_by == "lift":
        worth = f"; lift {evaluation.metrics['lift']}, at most {measure.oracle_lift:.3f}"
    elif math.isfinite(possible):
        worth = f"; APGR {evaluation.metrics['apgr']}, at most {possible:.3f}"
    sentences = [
        f"Selected: {_why(fitted, options.groups_known)}",
        "Labels: " + ", ".join(f"{n:,} {name}" for name, n in sizes.items()) + ".",
        f"{how[0].upper()}{how[1:]}.",
        fitted.file.threshold.sentence,
        f"On {measure.n:,} test prompts: {_calls(evaluation)}, at {evaluation.routed.of_strong} of "
        f"{names[-1]}'s quality{worth}.",
        *fitted.verdict.notes,
        *_label_cost(fitted),
    ]
    if options.unit is None and fitted.file.unit == "calls" and fitted.file.costs != (0, 1):
        sentences.append("Costs count as calls; if they are something else, --unit names it.")
    if written:
        sentences.append(f"Router: {fitted.folder}")
    if not options.scorer and (untried := _untried(options)):
        sentences.insert(1, f"Not tried: {'; '.join(untried)}.")
    if not worth:
        sentences.insert(0, _nothing_to_gain(fitted))
    terminal.draw((), [f"{fitted.verdict}", ""])
    terminal.draw([table], sentences)


def _untried(options: FitOptions) -> list[str]:
    """The kinds that need a model that was not named."""
    from pliant.routing.scorers import READS_A_MODEL, READS_AN_ENCODER

    untried = []
    if options.base is None:
        untried.append(f"{', '.join(READS_A_MODEL)}, which read a model (--base nano-s, say)")
    if options.encoder is None:
        untried.append(f"{', '.join(READS_AN_ENCODER)}, which read an encoder (--encoder minilm)")
    return untried


def _calls(evaluation: Evaluation) -> str:
    """The share of calls to the strongest model or, of several or at one price, to each."""
    from pliant.routing.units import percent

    shares = evaluation.routed.shares
    if evaluation.report.ranked_by == "lift":
        return ", ".join(f"{percent(share)} of calls to {name}" for name, share in shares.items())
    return f"{percent(evaluation.routed.share)} of calls to {evaluation.report.models[-1]}"


def _why(fitted: Fitted, groups_known: bool) -> str:
    """Why this scorer was selected: it is compared with those that could have been."""
    from pliant.routing.fitting.ladder import PREFERRED, eligible

    could_be = eligible(fitted.rungs, groups_known)
    highest, kind = max(rung.worth for rung in could_be), fitted.selected.kind
    preferred = next((k for k in PREFERRED if any(r.kind == k for r in could_be)), None)
    if len(could_be) == 1:
        sentences = [f"{kind}, the only one tried that can be."]
    elif kind == preferred:
        sentences = [f"{kind}, the preferred one; no other was shown to be better."]
    elif preferred is not None:
        sentences = [f"{kind}, shown to be better than {preferred}."]
    else:
        sentences = [f"{kind}, the best of them."]
    for rung in fitted.rungs:
        if rung.scorer.needs_groups and rung not in could_be and rung.worth > highest:
            sentences.append(f"{rung.kind} is better, but needs --groups-known.")
    return " ".join(sentences)


def _label_cost(fitted: Fitted) -> list[str]:
    """What the labels cost, and when the router has paid for them."""
    from pliant.reports.tables import count
    from pliant.routing.live.decision import Costing
    from pliant.routing.units import amount

    cost = Costing(fitted.file).labels()
    if not cost:
        return []
    if fitted.verdict.same_price:
        return [f"The labels cost {amount(cost, fitted.file.unit)}."]
    after = fitted.verdict.paid_back(cost)
    paid = "never earned back" if after is None else f"earned back after {count(after)} prompts"
    return [f"The labels cost {amount(cost, fitted.file.unit)}: {paid}."]


def _nothing_to_gain(fitted: Fitted) -> str:
    weak, strong = fitted.file.names[0], fitted.file.names[-1]
    report = fitted.evaluation.report
    return (
        f"WARNING: on the test split {strong} is not better than {weak} (quality "
        f"{report.strong_quality:.3f} and {report.weak_quality:.3f}), so APGR is undefined: these "
        "labels are too few to tell the models apart, or the models are equally good."
    )


# --- calibrate -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(LabelsOptions, RouterOptions):
    labels: str = ""
    """Labels: new ones, or those of the fit again."""
    prompts: str = ""
    """Instead of labels, for a share of calls: prompts alone."""
    goal: str = "95 % of the large model's quality, with 80 % confidence"
    """A budget, a quality or a risk, in words."""
    calibration: Calibration = "platt"
    """How scores become probabilities."""
    force: bool = False
    """Change the router even if it then saves nothing, with a quality or a risk."""

    def __post_init__(self) -> None:
        if bool(self.labels) == bool(self.prompts):
            raise InvalidInput("--labels or --prompts: give one of the two")
        if self.prompts and self.unit is not None:
            raise InvalidInput(f"--unit {self.unit}: prompts alone have no costs")
        if self.prompts and self.calibration != "platt":
            raise InvalidInput(f"--calibration {self.calibration}: needs --labels")
        if self.prompts and self.force:
            raise InvalidInput("--force: needs --labels; prompts alone do not tell what is saved")

    def prompts_alone(self) -> tuple[list[Prompt], list[str] | None]:
        """The prompts, and their groups if all of them have one."""
        rows = self.read(self.prompts, limit=self.limit)
        groups = [row.get(self.group_column) for row in rows]
        known = None if None in groups else [str(group) for group in groups]
        return [row["prompt"] for row in rows], known


def calibrate(options: CalibrateOptions) -> None:
    """Recompute a router's probabilities and threshold, on new labels or for a new goal.

    The scorer does not change. The labels of its fit serve again, by what it predicted of them in
    the cross-validation. A goal such as "30 % of calls" needs prompts alone: --prompts instead of
    --labels.

    A router that would save nothing on the labels with a quality or a risk stays as it is, without
    --force: the exit code is then 2. With a budget it is changed, and a warning says so.

    Example: pliant route calibrate --router my-router --labels new.jsonl --goal "30 % of calls"
    """
    from pliant.routing.fitting.verdict import SavesNothing

    terminal.hide_loading_bars()
    options.register_scorer()
    refused: SavesNothing | None = None
    try:
        calibrated = _calibrated(options)
    except SavesNothing as error:
        calibrated, refused = error.calibrated, error
    if options.json:
        terminal.print_json({**calibrated.as_dict(), "written": refused is None})
    else:
        if calibrated.left_out:
            terminal.print_text(
                f"{calibrated.left_out:,} prompts left out: the router was fitted on them"
            )
        terminal.print_text(str(calibrated.threshold))
        if refused is None and calibrated.verdict is not None and not calibrated.verdict.pays:
            terminal.print_text(f"WARNING: the router {calibrated.verdict.headline}.")
    if refused is not None:
        raise refused


def _calibrated(options: CalibrateOptions) -> Calibrated:
    from pliant.routing.fitting.calibrating import calibrate

    goal, force = options.goal, options.force
    if options.labels:
        labels = options.outcomes()
        return calibrate(options.router, labels, goal, options.calibration, force=force)
    prompts, groups = options.prompts_alone()
    return calibrate(options.router, prompts, goal, groups=groups)


# --- evaluate ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(LabelsOptions, RouterOptions):
    device: str | None = None
    """Where a model that the scorer reads runs: cpu, cuda, ..."""


def evaluate(options: EvaluateOptions) -> None:
    """Measure a router on held-out labels, beside its baselines.

    Prompts that the router was fitted on are left out and counted.

    Example: pliant route evaluate --router my-router --labels test.jsonl
    """
    from pliant.cli.route import tables
    from pliant.routing.fitting.evaluate import evaluate as measure

    terminal.hide_loading_bars()
    options.register_scorer()
    evaluation = measure(options.router, options.outcomes(), options.device)
    if options.json:
        terminal.print_json(evaluation.as_dict())
        return
    shown = [tables.metrics(evaluation), tables.baselines(evaluation)]
    if evaluation.calibration:
        shown.append(tables.probabilities(evaluation))
    terminal.draw((), [f"{evaluation.verdict}", ""])
    terminal.draw(shown, _sentences(evaluation))


def _sentences(evaluation: Evaluation) -> list[str]:
    from pliant.cli.route.tables import novelty

    report, sentences, best = evaluation.report, [], ""
    if math.isfinite(report.oracle_apgr):
        best = f", the best possible APGR {report.oracle_apgr:.3f}"
    alone = ", ".join(f"{name} alone {right:.3f}" for name, right in evaluation.alone.items())
    if evaluation.no_difference:
        sentences.append(f"WARNING: {evaluation.no_difference}")
    if evaluation.incomplete:
        sentences.append(
            f"WARNING: not every model was asked {evaluation.incomplete:,} of these prompts; they "
            "are left out of everything above."
        )
    if evaluation.left_out:
        sentences.append(
            f"WARNING: the router was fitted on {evaluation.left_out:,} of these prompts; they are "
            "left out of everything above."
        )
    return [
        *sentences,
        f"{report.n:,} prompts. {alone}{best}.",
        str(evaluation),
        *(() if evaluation.verdict is None else evaluation.verdict.notes),
        *novelty(evaluation),
    ]
