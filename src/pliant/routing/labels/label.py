"""From prompts to labels: who is right on which prompt, and what did each answer cost?

    found = label(prompts, models, verifier("exact"), Path("labels.jsonl"), settings=settings)

Every answer goes into a journal beside the labels (`labels.answers.jsonl`) as it comes: a job that
is killed goes on from there, what failed is asked again by the next run, and another verifier or
another model costs only what is new. The labels themselves are written at the end, all at once: the
prompts that every model has answered, in the order of the prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pliant.data import Journal, Row, read_rows, write_rows
from pliant.errors import InvalidInput
from pliant.routing.backends.costs import Used
from pliant.routing.backends.protocol import Answers, Asked, Settings
from pliant.routing.labels.grading import Grader
from pliant.routing.labels.rows import (
    Columns,
    Model,
    Reached,
    Run,
    Table,
    answer_key,
    answer_row,
)
from pliant.routing.prompts import Prompt, digest

GIVE_UP = 20  # failures in a row, after which a model is taken for dead and asked no more
FORMAT = 1
JUDGE = "the judge"
"""What grading by a model is counted under, beside the models: no name of theirs has a space."""
COLUMNS = Columns()
UNITS = ("usd", "flops", "tokens", "ms")


class Progress(Protocol):
    """Goes through what comes, and may show how far it is."""

    def __call__(self, items: Iterable[Any], what: str, total: int) -> Iterable[Any]: ...


@dataclass(frozen=True)
class Labelled:
    """What a run of `label` has done."""

    path: Path
    journal: Path
    rows: int
    """Prompts that are labelled."""
    missing: int
    """Prompts that are not, because some model or the verifier failed on them."""
    unit: str
    runs: tuple[Run, ...]
    judging: Used | None = None

    @property
    def failures(self) -> int:
        return sum(sum(run.failures.values()) for run in self.runs)

    def as_dict(self) -> dict[str, Any]:
        runs = [{**asdict(run), "used": run.used.as_dict()} for run in self.runs]
        return {
            "labels": str(self.path),
            "answers": str(self.journal),
            "rows": self.rows,
            "missing": self.missing,
            "unit": self.unit,
            "models": runs,
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
    progress: Progress | None = None,
) -> Labelled:
    """Ask every model every prompt that it has not answered yet, grade, and write the labels.

    `prompts` are rows; what they hold beside the prompt and its reference is kept.
    """
    unit = unit or usual_unit(models)
    _refuse_unit(unit, models)
    _refuse_name(out)
    shown: Progress = progress or (lambda items, what, total: items)
    runs = {model.name: Run(model.name) for model in models}
    with Journal(journal_of(out)) as journal, _nothing_left_of_nothing(journal):
        _refuse_other_settings(journal, settings, models)
        asked = _asked(prompts, columns, runs)
        for model in models:
            _ask(model, asked, settings, journal, runs[model.name], shown)
        table = Table(prompts, columns, journal, models, unit)
        judging = grader.prepare(table.to_grade(), journal, shown)
        rows = list(table.rows(grader, runs))
    if rows:
        write_rows(out, rows)
    for run in runs.values():
        run.right = sum(row["right"][run.name] for row in rows) / max(1, len(rows))
    missing = len(prompts) - len(rows)
    return Labelled(out, journal.path, len(rows), missing, unit, tuple(runs.values()), judging)


def label_cost(path: Path) -> dict[str, Used]:
    """What the labels in a file cost to make, by model and, if there was one, for JUDGE.

    The answers to a prompt are counted once, however many rows it has.
    """
    total: dict[str, Used] = {}
    seen: set[str] = set()

    def count(name: str, used: Row) -> None:
        more = Used.from_dict(used)
        total[name] = total[name] + more if name in total else more

    for row in read_rows(path, ("prompt",)):
        key = digest(row.get("messages") or row["prompt"])
        for name, used in (row.get("used") or {}).items() if key not in seen else ():
            count(name, used)
        if row.get("judging"):
            count(JUDGE, row["judging"])
        seen.add(key)
    return total


def reached(path: Path) -> dict[str, Reached]:
    """How the models of a label file are reached, as its last rows say."""
    found: dict[str, Row] = {}
    for row in read_rows(path, ("prompt",)):
        found |= row.get("reached") or {}
    return {name: Reached.from_dict(how) for name, how in found.items()}


def journal_of(out: Path) -> Path:
    """Where the answers are kept: `labels.answers.jsonl` beside `labels.jsonl`."""
    return out.with_name(out.name.removesuffix(".gz").removesuffix(".jsonl") + ".answers.jsonl")


def usual_unit(models: Sequence[Model]) -> str:
    """Money, where every model has a price; arithmetic, where all of them run here."""
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
    asked: Mapping[str, Prompt],
    settings: Settings,
    journal: Journal,
    run: Run,
    shown: Progress,
) -> None:
    """Ask what is not in the journal yet; an answer is in it before the next one is looked at."""
    keys = [key for key in asked if answer_key(model, key) not in journal]
    run.answered = len(asked) - len(keys)
    if not keys:
        return
    answers = model.backend.ask([asked[key] for key in keys], settings)
    in_a_row = done = 0
    with closing(_iterator(answers)) as stream:
        for at, found in shown(stream, f"asking {model.name}", len(keys)):
            done += 1
            if isinstance(found, Answers):
                journal.add(answer_row(model, keys[at], found))
                run.new, run.answered, in_a_row = run.new + 1, run.answered + 1, 0
                continue
            run.fails(found, found.kind)
            in_a_row = 0 if found.prompts_fault else in_a_row + 1
            if found.hopeless or in_a_row >= GIVE_UP:
                break
    if done < len(keys):
        why = f"{model.name}: not asked any more after {in_a_row} failures in a row"
        run.fails(why, "not asked", len(keys) - done)


def _iterator(answers: Iterator[Asked]) -> Any:
    """As a generator, which can be closed: a backend then stops what has not begun."""
    yield from answers


def _asked(prompts: Sequence[Row], columns: Columns, runs: Mapping[str, Run]) -> dict[str, Prompt]:
    """Each different prompt by its digest; what is no prompt fails for every model."""
    asked: dict[str, Prompt] = {}
    for row in prompts:
        try:
            asked.setdefault(digest(row[columns.prompt]), row[columns.prompt])
        except InvalidInput as error:
            for run in runs.values():
                run.fails(error, "prompt refused")
    return asked


@contextmanager
def _nothing_left_of_nothing(journal: Journal) -> Iterator[None]:
    """A journal in which nobody has answered anything is not kept."""
    try:
        yield
    finally:
        if not any(_is_answer(row) for row in journal.rows()):
            journal.path.unlink(missing_ok=True)


def _refuse_other_settings(journal: Journal, settings: Settings, models: Sequence[Model]) -> None:
    """Answers that were given under other settings, or by another model of that name."""
    now = {"format": FORMAT, **asdict(settings)}
    kept = journal.rows()
    before = {row["key"]: row for row in kept if row["key"].startswith("how ")}
    answers = [row["key"] for row in kept if _is_answer(row)]
    stated: list[tuple[str, Row]] = [("answer of ", {"key": "how all were asked", **now})]
    stated += [
        (answer_key(m, ""), {"key": f"how {m.name} was asked", "spec": str(m.spec)}) for m in models
    ]
    for whose, row in stated:
        old = before.get(row["key"])
        if old is None or not any(key.startswith(whose) for key in answers):
            journal.add(row)  # what nothing was answered under binds nobody
            continue
        for name, value in row.items():
            if old.get(name) != value:
                raise InvalidInput(
                    f"{journal.path} holds answers with {name}={old.get(name)!r}, not {value!r}: "
                    "label into another file, or ask as before"
                )


def _is_answer(row: Row) -> bool:
    return str(row["key"]).startswith("answer of ")


def _refuse_unit(unit: str, models: Sequence[Model]) -> None:
    if unit not in UNITS:
        raise InvalidInput(f"cost {unit!r}: one of {', '.join(UNITS)}")
    for model in models:
        if unit == "usd" and model.price is None:
            raise InvalidInput(f"{model.name} has no price: --price {model.name}=PROMPT,ANSWER")
        if unit == "flops" and not model.backend.knows("flops"):
            raise InvalidInput(f"{model.name} runs elsewhere: its arithmetic is not known")


def _refuse_name(out: Path) -> None:
    if not out.name.endswith((".jsonl", ".jsonl.gz")) or out.is_dir():
        raise InvalidInput(f"{out}: labels are a file that ends in .jsonl or .jsonl.gz")
