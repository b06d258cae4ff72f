"""A report as the sections of one page: sentences, pictures and tables."""

from __future__ import annotations

from pliant.cli.routes import pictures
from pliant.cli.routes import report_tables as tables
from pliant.cli.routes.gathered import Gathered, Measured
from pliant.reports.page import Section
from pliant.reports.tables import count

MEASURE_IT = (
    "Nothing is measured here: the folder holds no evaluation. Give labels of prompts that the "
    "router was not made on, as in --labels test.jsonl."
)
_OUTDATED = (
    "The threshold was set anew after this was measured, so that its point, its probabilities and "
    "its examples are left out: --labels measures the router as it is now."
)


def sections(found: Gathered) -> list[Section]:
    measured = found.measured
    made = [_first(found)]
    if measured is not None:
        made.append(_against_others(found, measured))
        if not measured.outdated:
            made += [*_probabilities(measured), *_examples(found, measured)]
    if found.ladder:
        made.append(Section("How the scorer was chosen", tables=[tables.ladder(found)]))
    return [*made, _labels(found), _ledger(found)]


def title(found: Gathered) -> str:
    names = ", ".join(found.file.names[:-1])
    return f"{found.folder.resolve().name}: a router between {names} and {found.strong}"


def what_it_does(found: Gathered) -> list[str]:
    """The threshold in words, and what it does on the measured prompts."""
    said = [found.file.threshold.sentence]
    said[0] = said[0][:1].upper() + said[0][1:]
    measured = found.measured
    if measured is None:
        return [*said, MEASURE_IT]
    content = measured.content
    if content["left_out"]:
        said.append(
            f"{content['left_out']:,} of the prompts are among those that the router was made on; "
            "they were left out, and count nowhere here."
        )
    if measured.outdated:
        return [*said, f"Measured on {measured.where}.", _OUTDATED]
    routed = content["routed"]
    shares = [f"{100 * part:.1f} % to {name}" for name, part in routed["shares"].items()]
    said.append(
        f"On {measured.where} calls go {' and '.join([', '.join(shares[:-1]), shares[-1]])}: "
        f"{_of(routed['of_strong'])} of the quality of {found.strong} alone, at "
        f"{_of(routed['of_strong_cost'])} of its cost."
    )
    if found.file.scorer.cost:
        unit = found.file.unit
        said.append(
            f"Scoring a prompt costs {tables.amount(found.file.scorer.cost, unit)}, which is not "
            "counted in that."
        )
    return [*said, *_besides(found, measured)]


def label_sentences(found: Gathered) -> list[str]:
    if not found.file.label_cost:
        return ["The router's file does not say what its labels cost."]
    said = []
    if found.label_cost is None:
        said.append(f"What the labels cost is not known in {found.file.unit} for every model.")
    elif found.paid_back is not None:
        said.append(
            f"At the measured saving the router has earned its labels after "
            f"{count(found.paid_back)} prompts."
        )
    elif found.measured is not None and not found.measured.outdated:
        said.append("At this threshold nothing is saved, so the labels are never earned back.")
    if found.totals is not None and found.label_cost is not None:
        left, unit = found.totals.saved - found.label_cost, found.file.unit
        said.append(
            f"By the ledger {tables.amount(found.totals.saved, unit)} were saved so far: "
            + (
                f"{tables.amount(left, unit)} more than the labels cost."
                if left >= 0
                else f"{tables.amount(-left, unit)} less than the labels cost."
            )
        )
    return said


def ledger_sentences(found: Gathered) -> list[str]:
    totals = found.totals
    if totals is None:
        return ["There is no ledger, or nothing in it yet: the router has not been asked."]
    unit = found.file.unit
    chose = totals.decisions - totals.answered - totals.failed
    said = [
        f"{totals.decisions:,} decisions: {totals.answered:,} answered, {totals.failed:,} failed, "
        f"{chose:,} only chose. They cost {tables.amount(totals.cost, unit)}, and "
        f"{tables.amount(totals.saved, unit)} less than always asking {found.strong}.",
        f"Another model stood in {totals.fell_over:,} times; {totals.from_session:,} followed "
        f"their session; {totals.novel:,} prompts were unlike those that the router was made on.",
    ]
    if not totals.windows:
        return [*said, "Too few scores so far to say whether they have drifted."]
    latest, drifted = totals.windows[-1], len(totals.drifted)
    said.append(
        f"Drift: {drifted:,} of {len(totals.windows):,} windows of scores lie beyond what chance "
        f"explains; the latest of {latest.size:,} prompts is {latest.distance:.3f} away (chance "
        f"stays below {latest.bound:.3f})."
    )
    if drifted:
        said.append("Label prompts of today, and fit or calibrate again.")
    return said


def _first(found: Gathered) -> Section:
    measured = found.measured
    if measured is None:
        return Section("Quality against cost", what_it_does(found))
    notes = [] if measured.worth else ["The band holds 95 % of resamples of the prompts."]
    if measured.perfect is None:
        notes.append("With --labels perfect routing is drawn, too.")
    if measured.worth is not None:
        notes.append(
            "The router's line and the perfect one use all models, as the price of cost goes up; "
            f"the others go between {found.weak} and {found.strong} alone."
        )
    elif len(found.file.names) > 2:
        notes.append(
            f"The lines go between {found.weak} and {found.strong} alone; the point uses all "
            "models, and lies off them. With --labels the router's line does so, too."
        )
    picture = (pictures.quality_against_cost(found, measured), "Quality against cost.")
    return Section(
        "Quality against cost",
        [*what_it_does(found), *([" ".join(notes)] if notes else [])],
        [tables.points(found, measured)],
        [picture],
    )


def _against_others(found: Gathered, measured: Measured) -> Section:
    made = [tables.metrics(found, measured), tables.baselines(measured)]
    if measured.groups and not measured.outdated:
        made.append(tables.groups(found, measured))
    return Section("Figures, and what they are worth", [f"On {measured.where}."], made)


def _probabilities(measured: Measured) -> list[Section]:
    calibration, histogram = measured.content["calibration"], measured.content["histogram"]
    if not calibration:
        return []
    drawn = [
        (pictures.probabilities(kept), f"{kept['model']}: predicted, and what was so.")
        for kept in calibration
    ]
    said = [
        "ECE is the mean distance between what is predicted and what is so (debiased; a constant "
        "can have none, and tells nothing). Brier is the mean squared error; skill is the part of "
        "the constant's that is gone. The grey bars show where the predictions lie."
    ]
    made = [Section("Probabilities", said, [tables.probabilities(measured)], drawn)]
    if histogram:
        words = f"The score is the probability that {histogram['model']} fails."
        split = (pictures.scores(histogram), f"Scores, by whether {histogram['model']} was right.")
        made.append(Section("Scores", [words], pictures=[split]))
    return made


def _examples(found: Gathered, measured: Measured) -> list[Section]:
    some = [table for table in tables.examples(found, measured) if table.rows]
    words = [
        f"The gain is how much more often {found.strong} is expected to be right than "
        f"{found.weak}; {tables.RIGHT} and {tables.WRONG} say who was."
    ]
    return [Section("On both sides of the threshold", words, some)] if some else []


def _labels(found: Gathered) -> Section:
    made = [tables.labels(found)] if found.file.label_cost else []
    return Section("What the labels cost", label_sentences(found), made)


def _ledger(found: Gathered) -> Section:
    if found.totals is None:
        return Section("The ledger", ledger_sentences(found))
    windows = found.totals.as_dict()["windows"]
    drawn = [(pictures.drift(windows), "Drift of the scores.")] if len(windows) > 1 else []
    return Section("The ledger", ledger_sentences(found), [tables.calls(found)], drawn)


def _besides(found: Gathered, measured: Measured) -> list[str]:
    said, content = [], measured.content
    if content["novel"] is not None:
        said.append(
            f"{100 * content['novel']:.1f} % of the prompts are unlike those that it was made on; "
            f"asked, it would send them to {found.file.default}."
            if found.file.novel == "default"
            else f"{100 * content['novel']:.1f} % of the prompts are unlike those it was made on."
        )
    same = content["paraphrases"]
    if same is not None:
        said.append(
            f"Of {same['questions']:,} questions in several wordings "
            f"{100 * same['same_model']:.1f} % go to one model in all of them; the predicted gain "
            f"moves by {same['spread']:.3f} on average."
        )
    return said


def _of(band: dict[str, float | None]) -> str:
    value, low, high = (band[name] for name in ("value", "low", "high"))
    if value is None:
        return "an unknown share"
    if low is None or high is None:
        return f"{100 * value:.1f} %"
    return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
