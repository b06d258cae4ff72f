"""From prompts to labels: which models are right on which prompt, and what did each answer cost?

    report = label(prompts, models, verifier("exact"), Path("labels.jsonl"), settings=settings)

Every answer is written at once into a journal beside the labels (`labels.answers.jsonl`). So a
killed job resumes from there, the next run asks failed prompts again, and another verifier or model
costs only what is new. The labels are written at the end, all at once: the prompts that every model
answered (with `partial`, that any model did), in the order of the prompts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pliant.data import Journal, Row, read_prompts, read_rows, write_rows
from pliant.errors import InvalidInput
from pliant.routing.backends import Answers, Result, Settings, Used
from pliant.routing.labels.grading import Grader
from pliant.routing.labels.table import (
    ANSWER,
    BackendDescription,
    Columns,
    LabelTable,
    Model,
    ModelReport,
    answer_key,
    answer_row,
)
from pliant.routing.prompts import Prompt, digest
from pliant.routing.units import percent

GIVE_UP = 20  # failures in a row after which a model gets no more prompts
FORMAT = 1
ALL = "how all were asked"
"""The key of the first row of a journal."""
JUDGE = "the judge"
"""The name of the judge's costs beside those of the models, whose names have no spaces."""
COLUMNS = Columns()
OURS = {"prompt", "right", "cost", "unit", "answers"}
"""Columns that every row of labels has."""
UNITS = ("usd", "flops", "tokens", "ms")


class Progress(Protocol):
    """Iterates over items, and may show the progress."""

    def __call__(self, items: Iterable[Any], what: str, total: int) -> Iterable[Any]: ...


@dataclass(frozen=True)
class LabelReport:
    """The result of `label`."""

    path: Path
    journal: Path
    rows: int
    """Prompts with labels."""
    missing: int
    """Prompts without, because a model or the verifier failed on them."""
    incomplete: int
    """Rows that lack a grade of some model; 0 unless they were asked for."""
    unit: str
    models: tuple[ModelReport, ...]
    judging: Used | None = None

    @property
    def cost(self) -> float | None:
        """Of making the labels, the judge included; None where that is unknown in their unit."""
        used = [model.used for model in self.models] + ([self.judging] if self.judging else [])
        if not all(each.known(self.unit) for each in used):
            return None
        return sum(each.of(self.unit) for each in used)

    @property
    def failures(self) -> int:
        return sum(sum(model.failures.values()) for model in self.models)

    def __str__(self) -> str:
        shares = [f"{model.name} is right on {percent(model.right)}" for model in self.models]
        missing = f" ({self.missing:,} could not be labelled)" if self.missing else ""
        return f"Of {self.rows:,} labelled prompts{missing} {', '.join(shares)}."

    def as_dict(self) -> dict[str, Any]:
        return {
            "labels": str(self.path),
            "answers": str(self.journal),
            "rows": self.rows,
            "missing": self.missing,
            "incomplete": self.incomplete,
            "unit": self.unit,
            "cost": self.cost,
            "models": [model.as_dict() for model in self.models],
            "judging": self.judging and self.judging.as_dict(),
        }


def label(
    prompts: Sequence[Row],
    models: Sequence[Model],
    grader: Grader,
    out: Path,
    *,
    settings: Settings,
    unit: str | None = None,
    columns: Columns = COLUMNS,
    partial: bool = False,
    progress: Progress | None = None,
) -> LabelReport:
    """Ask every model the prompts that it has not answered yet, grade, and write the labels.

    `prompts` are rows; the labels keep their other columns. With `partial` a prompt that a model
    failed on has a row with the grades of the others.
    """
    unit = unit or usual_unit(models)
    _check_unit(unit, models)
    _check_name(out)
    shown: Progress = progress or (lambda items, what, total: items)
    reports = {model.name: ModelReport(model.name) for model in models}
    _check_ours(out)
    with _journal(journal_of(out)) as journal:
        _check_settings(journal, settings, models)
        distinct = _distinct(prompts, columns, reports)
        for model in models:
            _ask(model, distinct, settings, journal, reports[model.name], shown)
        table = LabelTable(prompts, columns, journal, models, unit, partial)
        judging = grader.prepare(table.to_grade(), journal, shown)
        rows = list(table.rows(grader, reports))
    if rows:
        write_rows(out, rows, private=True)
    for name, report in reports.items():
        grades = [row["right"][name] for row in rows if name in row["right"]]
        report.right = sum(grades) / max(1, len(grades))
    missing, models_done = len(prompts) - len(rows), tuple(reports.values())
    lacking = sum(len(row["right"]) < len(models) for row in rows)
    return LabelReport(out, journal.path, len(rows), missing, lacking, unit, models_done, judging)


def label_cost(
    path: str | Path, prompt: str = "prompt", messages: str | None = None
) -> dict[str, Used]:
    """What making the labels of a file cost, by model and, if there was a judge, for JUDGE.

    The answers to a prompt count once, however many rows it has.
    """
    total: dict[str, Used] = {}
    seen: set[str] = set()

    def count(name: str, used: Any, at: int) -> None:
        try:
            more = Used.from_dict(used)
        except InvalidInput as error:
            raise InvalidInput(f"{path}, row {at}: {error}") from None
        total[name] = total[name] + more if name in total else more

    for at, row in enumerate(read_prompts(path, (prompt,), messages=messages), 1):
        used = _by_model(path, at, row, "used")
        if not (used or row.get("judging")):
            continue  # of another's making
        key = digest(row.get("messages") or row[prompt])
        for name, amounts in used.items() if key not in seen else ():
            count(name, amounts, at)
        if row.get("judging"):
            count(JUDGE, row["judging"], at)
        seen.add(key)
    return total


def backend_descriptions(
    path: str | Path, prompt: str = "prompt", messages: str | None = None
) -> dict[str, BackendDescription]:
    """The backends of the models in a label file, by its last rows."""
    last: dict[str, BackendDescription] = {}
    for at, row in enumerate(read_prompts(path, (prompt,), messages=messages), 1):
        for name, description in _by_model(path, at, row, "reached").items():
            try:
                last[name] = BackendDescription.from_dict(description)
            except InvalidInput as error:
                raise InvalidInput(f"{path}, row {at}: {error}") from None
    return last


def _by_model(path: str | Path, at: int, row: Row, column: str) -> Mapping[str, Any]:
    """A column that holds something for each model, or nothing."""
    values = row.get(column) or {}
    if not isinstance(values, Mapping):
        raise InvalidInput(f"{path}, row {at}: {column} = {values!r} is not by model")
    return values


def journal_of(out: Path) -> Path:
    """The file of the answers: `labels.answers.jsonl` beside `labels.jsonl`."""
    return out.with_name(out.name.removesuffix(".gz").removesuffix(".jsonl") + ".answers.jsonl")


def usual_unit(models: Sequence[Model]) -> str:
    """Dollars if every model has a price, floating-point operations if all of them run here."""
    if all(model.price is not None for model in models):
        return "usd"
    if all(model.backend.knows("flops") for model in models):
        return "flops"
    raise InvalidInput(
        "what do these models cost? Give each a price (--price NAME=2.50,10), or say which cost "
        "counts: --cost tokens or ms"
    )


# --- asking --------------------------------------------------------------------------------------


def _ask(
    model: Model,
    prompts: Mapping[str, Prompt],
    settings: Settings,
    journal: Journal,
    report: ModelReport,
    shown: Progress,
) -> None:
    """Ask the prompts that are not in the journal yet, and add each answer to it at once."""
    keys = [key for key in prompts if answer_key(model, key) not in journal]
    report.answered = len(prompts) - len(keys)
    if not keys:
        return
    results = model.backend.ask([prompts[key] for key in keys], settings)
    in_a_row = done = 0
    with closing(_generator(results)) as stream:
        for at, result in shown(stream, f"asking {model.name}", len(keys)):
            done += 1
            if isinstance(result, Answers):
                journal.add(answer_row(model, keys[at], result))
                report.new, report.answered, in_a_row = report.new + 1, report.answered + 1, 0
                continue
            report.add_failure(result, result.kind)
            in_a_row = 0 if result.prompts_fault else in_a_row + 1
            if result.fatal or in_a_row >= GIVE_UP:
                break
    if done < len(keys):
        reason = f"{model.name}: gets no more prompts after {in_a_row} failures in a row"
        report.add_failure(reason, "not asked", len(keys) - done)


def _generator(results: Iterator[Result]) -> Any:
    """A generator can be closed, whereupon a backend starts no further calls."""
    yield from results


def _distinct(
    prompts: Sequence[Row], columns: Columns, reports: Mapping[str, ModelReport]
) -> dict[str, Prompt]:
    """The distinct prompts by their digests; an invalid one is a failure of every model."""
    distinct: dict[str, Prompt] = {}
    for row in prompts:
        try:
            distinct.setdefault(digest(row[columns.prompt]), row[columns.prompt])
        except InvalidInput as error:
            for report in reports.values():
                report.add_failure(error, "prompt refused")
    return distinct


@contextmanager
def _journal(path: Path) -> Iterator[Journal]:
    """The journal, which is removed again if it is new and holds no answers in the end."""
    with Journal(path, private=True, start=f'{{"key": "{ALL}"') as journal:
        try:
            yield journal
        finally:
            if journal.is_new and not any(_is_answer(row) for row in journal.rows()):
                journal.path.unlink(missing_ok=True)


def _check_settings(journal: Journal, settings: Settings, models: Sequence[Model]) -> None:
    """Refuse answers under other settings, or by another model of the same name."""
    now = {"format": FORMAT, **asdict(settings)}
    stored = journal.rows()
    before = {row["key"]: row for row in stored if str(row["key"]).startswith("how ")}
    answers = [row["key"] for row in stored if _is_answer(row)]
    stated: list[tuple[str, Row]] = [(ANSWER, {"key": ALL, **now})]
    stated += [
        (answer_key(m, ""), {"key": f"how {m.name} was asked", **_how_asked(m)}) for m in models
    ]
    for whose, row in stated:
        old = before.get(row["key"])
        if old is None or not any(key.startswith(whose) for key in answers):
            journal.add(row)  # settings without answers may change
            continue
        for name in dict.fromkeys([*row, *old]):
            value = row.get(name)
            if old.get(name) != value:
                raise InvalidInput(
                    f"{journal.path} holds answers with {name}={old.get(name)!r}, not {value!r}: "
                    "label into another file, or ask as before"
                )


def _how_asked(model: Model) -> Row:
    return {"spec": str(model.spec), **model.prompt_format.as_dict()}


def _is_answer(row: Row) -> bool:
    return str(row["key"]).startswith(ANSWER)


def _check_unit(unit: str, models: Sequence[Model]) -> None:
    if unit not in UNITS:
        raise InvalidInput(f"cost {unit!r}: give one of {', '.join(UNITS)}")
    for model in models:
        if unit == "usd" and model.price is None:
            raise InvalidInput(f"{model.name} has no price: --price {model.name}=PROMPT,ANSWER")
        if unit == "flops" and not model.backend.knows("flops"):
            raise InvalidInput(f"{model.name} runs elsewhere: its flops are not known")


def _check_name(out: Path) -> None:
    if not re.fullmatch(r".+\.jsonl(\.gz)?", out.name) or out.is_dir():
        raise InvalidInput(f"{out}: the name of a label file ends in .jsonl or .jsonl.gz")


def _check_ours(out: Path) -> None:
    """Refuse to replace a file of other rows, or labels whose answers are no longer beside them."""
    if not out.exists() or (out.is_file() and not out.stat().st_size):
        return
    try:
        (first,) = read_rows(out, limit=1)
        is_ours = out.is_file() and first.keys() >= OURS
    except InvalidInput:
        is_ours = False
    if not is_ours:
        raise InvalidInput(f"{out}: holds something else than labels: name another file")
    if not journal_of(out).is_file():
        raise InvalidInput(
            f"{out}: holds labels whose answers are not beside it (no {journal_of(out).name}), so "
            "they would be lost: name another file"
        )
