"""`pliant score SCORER`: how hard prompts are, by a saved scorer or router."""

from __future__ import annotations

import json as encoder
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from pliant.cli import terminal
from pliant.cli.shared_options import DeviceOptions, PromptColumns
from pliant.errors import InvalidInput
from pliant.loading.dtypes import Dtype
from pliant.options import Flag

if TYPE_CHECKING:
    from pliant.complexity.scores import Scores
    from pliant.reports.tables import Table
    from pliant.routing.scorers import Predictions

SHOWN = 60  # characters of a prompt in the table
TEXT = (".txt", ".text", "")
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(PromptColumns, DeviceOptions):
    scorer: Annotated[str, Flag(positional=True)]
    """A saved scorer (a folder, or on the hub), or a router's folder."""
    prompts: Annotated[tuple[str, ...], Flag(positional=True)] = ()
    """If they are left out or -, one is read from each line of stdin."""
    file: Path | None = None
    """A file of prompts: .txt with one on each line, or JSONL, CSV, parquet. Default: the prompts
    are arguments."""
    chat: bool = False
    """Put each text through the chat template, as a user's message."""
    base: str | None = None
    """The scorer's base model, if it has moved. Default: the one that the scorer names."""
    truncation: Literal["left", "right"] | None = None
    """The end at which to truncate prompts that are too long. Default: they are an error."""
    batch_size: Annotated[int, Ge(1)] | None = None
    """Prompts per batch. Default: as many as fit well."""
    dtype: Dtype | None = None
    """The base model's type. Default: as it was saved."""
    json: bool = False
    """Print one JSON object per prompt, one on each line."""

    def scoring(self) -> dict[str, Any]:
        return {"chat": self.chat, "truncation": self.truncation, "batch_size": self.batch_size}

    def loading(self) -> dict[str, Any]:
        given = {"base": self.base, "dtype": self.dtype, "device": self.device}
        return {name: value for name, value in given.items() if value is not None}


def score(options: ScoreOptions) -> None:
    """Score how hard prompts are: the score is the probability that the model fails.

    A gain, where the scorer has one, is how much more often the strong model would be right.

    Example: pliant score my-scorer "What is 2 + 2?" "Prove it."
    """
    prompts = read_prompts(options.prompts, options.file, options)
    rows = score_rows(options.scorer, prompts, options.scoring(), options.loading())
    if options.json:
        for row in rows:
            print(encoder.dumps(row, ensure_ascii=False, allow_nan=False))
    else:
        table(options.scorer, rows).draw(terminal.console())


def score_rows(
    name: str, prompts: Sequence[Any], scoring: dict[str, Any], loading: dict[str, Any]
) -> list[Row]:
    """One row for each prompt, from a scorer or a router."""
    folder = Path(name).expanduser()
    files = [file for file in ("router.json", "scorer.json") if (folder / file).is_file()]
    if files:
        settings = [*loading, *(key for key, value in scoring.items() if value)]
        if settings:
            raise InvalidInput(
                f"--{settings[0].replace('_', '-')}: the router's folder settles this; leave it out"
            )
        return _by_router(folder, files[0], prompts)
    _check_scorer(name)
    from pliant.complexity.facade import CPXCausalLM  # after what can fail at once

    model = CPXCausalLM.from_pretrained(name, **loading)
    return _rows_of(prompts, model.score(prompts, **scoring))


def _by_router(folder: Path, kind: str, prompts: Sequence[Any]) -> list[Row]:
    from pliant.routing import router_file, scorers
    from pliant.routing.fitting.evaluate import calibrated

    if kind == "scorer.json":
        return _rows_predicted(prompts, scorers.load(folder).predict(prompts))
    file = router_file.read(folder)
    predictions = file.open_scorer(folder).predict(prompts)
    # The router's calibrated probabilities, which `route ask` shows for the same prompt.
    right = calibrated(file, predictions)
    return _rows_predicted(prompts, replace(predictions, right=right))


def _check_scorer(name: str) -> None:
    """Refuse a folder without a scorer before torch is imported."""
    folder = Path(name).expanduser()
    local = folder.is_absolute() or name.startswith((".", "~")) or folder.exists()
    # A name on the hub has one slash, and an owner who is no folder here.
    local = local or name.count("/") != 1 or folder.parent.is_dir()
    if not local or "/" not in name:
        from pliant.loading import embedded

        if name in embedded():
            raise InvalidInput(f"{name!r} is a model, not a scorer: train one on it first")
    if not local:
        return
    if not folder.is_dir():
        raise InvalidInput(
            f"{name!r}: no such folder, so no scorer and no router (on the hub: OWNER/NAME)"
        )
    if not (folder / "pliant.json").is_file():
        raise InvalidInput(
            f"{name!r} holds no scorer (looked for pliant.json, router.json, scorer.json)"
        )


def _rows_of(prompts: Sequence[Any], scores: Scores) -> list[Row]:
    try:
        score = scores.score
    except InvalidInput:  # its outputs mean something else, such as domains
        score = None
    named = _rows({name: scores[name] for name in scores.outputs}, len(prompts))
    rows = _rows({"score": score, "gain": scores.gain}, len(prompts))
    return [
        {"prompt": prompt, **row, "outputs": outputs}
        for prompt, row, outputs in zip(prompts, rows, named, strict=True)
    ]


def _rows_predicted(prompts: Sequence[Any], predictions: Predictions) -> list[Row]:
    score = None if predictions.right is None else predictions.score
    columns = {"score": score, "gain": predictions.last_gain, "novel": predictions.novel}
    rows = _rows(columns, len(prompts))
    return [{"prompt": prompt, **row} for prompt, row in zip(prompts, rows, strict=True)]


def _rows(columns: dict[str, Any], n: int) -> list[Row]:
    """The rows of those arrays that there are."""
    lists = {name: values.tolist() for name, values in columns.items() if values is not None}
    return [{name: values[i] for name, values in lists.items()} for i in range(n)]


def table(name: str, rows: Sequence[Row]) -> Table:
    from pliant.reports.tables import Table

    figures = [key for key in ("score", "gain") if rows and key in rows[0]]
    others = [k for k in (rows[0].get("outputs", {}) if rows else {}) if k not in figures]
    notes = ["novel"] if rows and "novel" in rows[0] else []
    head = [*figures, *others, *notes, "prompt"]
    cells = [
        [
            *(f"{row[key]:.4f}" for key in figures),
            *(f"{row['outputs'][key]:.4f}" for key in others),
            *("yes" if row[key] else "" for key in notes),
            shown(row["prompt"]),
        ]
        for row in rows
    ]
    count = f"{len(rows):,} prompt{'s' if len(rows) != 1 else ''}"
    return Table(f"{name}: {count}", head, cells, right=frozenset([*figures, *others]))


def shown(prompt: Any) -> str:
    """One short line of a prompt; of a conversation, its last message."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."


def read_prompts(texts: Sequence[str], file: Path | None, columns: PromptColumns) -> list[Any]:
    """The prompts, from the arguments, a file or stdin: only one of them."""
    if texts and file is not None:
        raise InvalidInput("prompts as arguments and --file: give one of the two")
    prompts: list[Any] = list(texts)
    if file is not None:
        prompts = _from_file(file, columns)
    elif not prompts or prompts == ["-"]:
        if sys.stdin.isatty() and not prompts:
            raise InvalidInput("no prompts: give them as arguments, with --file, or on stdin")
        prompts = _lines(terminal.read_stdin())
    if not prompts:
        raise InvalidInput("it contains no prompts")
    return prompts


def _from_file(file: Path, columns: PromptColumns) -> list[Any]:
    if file.suffix.lower() in TEXT:
        try:
            return _lines(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise InvalidInput(f"{file}: not text in UTF-8 ({error.reason})") from error
    from pliant.data import check_messages

    prompts = [row["prompt"] for row in columns.read(str(file))]
    for at, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            check_messages(prompt, f"{file}, row {at}")
    return prompts


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]
