"""Routing from Python in three calls, as on the command line: label, fit, evaluate.

    from pliant import Router, route

    labels = route.label("questions.jsonl", models=["nano-s", "nano-l"], max_new_tokens=24)
    fitted = route.fit(labels, "my-router", base="nano-s", goal="30 % of calls")
    print(fitted)                                  # whether it pays
    print(route.evaluate(fitted, "test.jsonl").verdict)
    Router.load("my-router").ask("what is 17+25?")

The commands of `pliant route` are these functions with options for arguments. `pliant.routing` has
the parts that they are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.errors import InvalidInput, did_you_mean

if TYPE_CHECKING:
    from pliant.data import Row
    from pliant.routing.backends import ModelSpec, Price, PromptFormat
    from pliant.routing.fitting.evaluation import Evaluation
    from pliant.routing.fitting.fit import Fitted
    from pliant.routing.labels.grading import Grader
    from pliant.routing.labels.label import LabelReport, Progress
    from pliant.routing.labels.table import Columns, Model
    from pliant.routing.outcomes import Outcomes

    Labels = str | Path | LabelReport | Outcomes
    """A file of labels, what `label` returned, or a table."""

__all__ = ["evaluate", "fit", "label"]
_COLUMNS = ("prompt", "messages", "right", "cost", "group", "wording", "question", "unit", "limit")
"""What `columns` may hold: the arguments of `Outcomes.read`."""


def label(
    prompts: str | Path | Sequence[Row],
    models: str | Sequence[str],
    out: str | Path | None = None,
    *,
    verifier: str | Callable[..., float] = "exact",
    verifier_options: Mapping[str, Any] | None = None,
    judge: str | None = None,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    limit: int | None = None,
    samples: int = 1,
    temperature: float | None = None,
    max_new_tokens: int = 256,
    seed: int = 0,
    template: str | None = None,
    system: str | None = None,
    stop: str | Sequence[str] = (),
    cost: str | None = None,
    prices: Mapping[str, str | tuple[float, float]] | None = None,
    api_key_env: str | Mapping[str, str] | None = None,
    batch_size: int | None = None,
    concurrency: int = 8,
    timeout: float = 120.0,
    tries: int = 6,
    device: str | None = None,
    dtype: str = "auto",
    partial: bool = False,
    progress: Progress | None = None,
) -> LabelReport:
    """Run models over prompts: which are right, and at what cost? A router needs 50 labels.

    `prompts` is a file, a data set or rows; the labels go to `out`, by default beside the file:
    questions.labels.jsonl. Models are written as on the command line (nano-s, a folder, a hub name,
    openai:MODEL@URL, NAME=...). `prices` are dollars for a million tokens in and out, by model;
    `api_key_env` names the variable that holds the key, for all models or by model. A `verifier` is
    a name, `grade.py:function` or a function. `partial` also writes prompts that some models failed
    on, with the grades of the others. After an interruption the same call goes on from
    there.
    """
    from pliant.routing.backends import PromptFormat, Settings
    from pliant.routing.labels.label import label as label_rows
    from pliant.routing.labels.table import Columns

    place = _place_of(prompts, out)
    if temperature is None:
        temperature = 0.0 if samples == 1 else 1.0
    settings = Settings(max_new_tokens, temperature, samples, seed)
    calls = {"concurrency": concurrency, "timeout": timeout, "tries": tries}
    here = {"device": device, "dtype": dtype, "batch_size": batch_size}
    framed = PromptFormat(template, system, tuple(_several(stop)))
    names, columns = _several(models), Columns(prompt_column, answer_column)
    with _opened(names, judge, framed, prices or {}, api_key_env, calls, here) as (opened, judging):
        options = dict(verifier_options or {})
        grader = _grader(verifier, options, judging, max_new_tokens, concurrency)
        rows = _rows(prompts, columns, grader, limit)
        how: dict[str, Any] = {"settings": settings, "unit": cost, "columns": columns}
        how["partial"] = partial
        return label_rows(rows, opened, grader, place, progress=progress, **how)


def fit(
    labels: Labels,
    out: str | Path,
    *,
    models: str | Sequence[str] | None = None,
    columns: Mapping[str, Any] | None = None,
    **options: Any,
) -> Fitted:
    """Fit a router on labels and write it to the folder `out`, if it pays.

    `columns` are those of `Outcomes.read` (prompt, messages, right, cost, group, wording, question,
    unit, limit), for a table of your own. Options are those of `pliant.routing.fitting.fit.fit`:
    goal, lam, base, encoder, scorers, calibrate_by, backends, groups_known, every, force, seed,
    progress.
    What the labels cost, and how to reach the models, is read from the labels. Raises SavesNothing,
    with all that was measured, where the router would not pay.
    """
    from pliant.routing.fitting.fit import fit as fit_router
    from pliant.routing.labels.label import LabelReport, backend_descriptions, label_cost

    outcomes = _outcomes(labels, models, columns)
    if isinstance(labels, LabelReport):
        labels = labels.path
    if isinstance(labels, (str, Path)):
        where = {n: x for n, x in (columns or {}).items() if n in ("prompt", "messages")}
        recorded = {
            "descriptions": backend_descriptions(labels, **where),
            "label_cost": label_cost(labels, **where),
        }
        options = {**recorded, **options}
    return fit_router(outcomes, out, **options)


def evaluate(
    router: str | Path | Fitted,
    labels: Labels,
    *,
    models: str | Sequence[str] | None = None,
    columns: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> Evaluation:
    """Measure a router on labels of prompts that it was not fitted on; `columns` as in `fit`.

    A model that the router's scorer reads runs on `device`.
    """
    from pliant.routing.fitting.evaluate import evaluate as measure

    folder = router if isinstance(router, (str, Path)) else router.folder
    return measure(folder, _outcomes(labels, models, columns), device)


# --- what the arguments mean ---------------------------------------------------------------------


def _outcomes(
    labels: Labels, models: str | Sequence[str] | None, columns: Mapping[str, Any] | None
) -> Outcomes:
    from pliant.routing.labels.label import LabelReport
    from pliant.routing.outcomes import Outcomes

    for name in columns or {}:
        if name not in _COLUMNS:
            raise InvalidInput(f"columns: no {name!r}{did_you_mean(name, _COLUMNS)}")
    models = None if models is None else _several(models)
    if isinstance(labels, Outcomes):
        return labels if models is None else labels.of_models(models)
    path = labels.path if isinstance(labels, LabelReport) else labels
    return Outcomes.read(path, models=models or None, **(columns or {}))


def _several(names: str | Sequence[str]) -> Sequence[str]:
    """A single text is one name, not its letters."""
    return (names,) if isinstance(names, str) else names


def _rows(
    prompts: str | Path | Sequence[Row], columns: Columns, grader: Grader, limit: int | None
) -> Sequence[Row]:
    """The rows to label; most verifiers need a column of answers."""
    from pliant.data import read_rows

    if isinstance(prompts, (str, Path)):
        needed = [columns.prompt] + ([columns.answer] if grader.name != "function" else [])
        prompts = read_rows(prompts, needed, limit=limit)
    if not prompts:
        raise InvalidInput("there are no prompts to label")
    return prompts[:limit]


def _place_of(prompts: str | Path | Sequence[Row], out: str | Path | None) -> Path:
    """Where the labels go, which is not where the prompts are."""
    place = _labels_beside(prompts) if out is None else Path(out)
    if isinstance(prompts, (str, Path)):
        _check_apart(prompts, place)
    return place


def _labels_beside(prompts: str | Path | Sequence[Row]) -> Path:
    """questions.labels.jsonl for questions.jsonl."""
    path = Path(prompts) if isinstance(prompts, (str, Path)) else None
    if path is None or not path.expanduser().is_file():
        raise InvalidInput("out: name the file of the labels (.jsonl); the prompts are in no file")
    name = path.name.removesuffix(".gz")
    return path.with_name(f"{name.rpartition('.')[0] or name}.labels.jsonl")


def _check_apart(prompts: str | Path, out: Path) -> None:
    """Refuse to write over the prompts."""
    from pliant.routing.labels.label import journal_of

    source = Path(prompts).expanduser()
    for place in (out, journal_of(out)):
        if source.exists() and place.exists() and source.samefile(place):
            raise InvalidInput(
                f"out={out} (--out): {place.name} is the file of the prompts, which labelling "
                "would overwrite: name another file"
            )


@contextmanager
def _opened(
    models: Sequence[str],
    judge: str | None,
    framed: PromptFormat,
    prices: Mapping[str, str | tuple[float, float]],
    api_key_env: str | Mapping[str, str] | None,
    calls: Mapping[str, Any],
    here: Mapping[str, Any],
) -> Iterator[tuple[list[Model], Model | None]]:
    """The models, and the judge if there is one, until the labels are there; nothing is loaded or
    called yet."""
    from pliant.routing.backends import ModelSpec, PromptFormat, Retry, check_names, open_backend
    from pliant.routing.backends.remote import KEY
    from pliant.routing.labels.table import Model

    specs = [ModelSpec.parse(text) for text in (*models, *([judge] if judge else []))]
    check_names(specs)
    priced = {name: _price(price) for name, price in _known(prices, specs, "prices").items()}
    keys = dict.fromkeys((spec.name for spec in specs), KEY)
    if isinstance(api_key_env, str):
        keys = dict.fromkeys(keys, api_key_env)
    else:
        keys |= _known(api_key_env or {}, specs, "api_key_env")
    _check_keys(specs, keys)
    opened: list[Model] = []
    for at, spec in enumerate(specs):
        key, local = keys[spec.name], spec.url is None
        settings = {name: value for name, value in calls.items() if name != "tries"}
        settings |= {"retry": Retry(tries=calls["tries"]), "key_env": key}
        asked = PromptFormat() if at >= len(models) else framed
        backend = open_backend(spec, prompt_format=asked, **(here if local else settings))
        key_env = None if local or key == KEY else key
        opened.append(Model(spec, backend, priced.get(spec.name), key_env, asked))
    try:
        yield opened[: len(models)], opened[-1] if judge else None
    finally:
        for each in opened:
            each.backend.close()


def _known(values: Mapping[str, Any], specs: Sequence[ModelSpec], what: str) -> dict[str, Any]:
    names = [spec.name for spec in specs]
    for name in values:
        if name not in names:
            raise InvalidInput(f"{what}: no model {name!r}{did_you_mean(name, names)}")
    return dict(values)


def _price(price: str | tuple[float, float]) -> Price:
    from pliant.routing.backends import Price

    return Price.parse(price) if isinstance(price, str) else Price(*price)


def _check_keys(specs: Sequence[ModelSpec], keys: Mapping[str, str]) -> None:
    """Refuse a key that cannot be sent, and a variable without one; neither is shown."""
    from pliant.credentials import api_key, check_variable
    from pliant.routing.backends.remote import KEY

    for spec in specs:
        variable = keys[spec.name]
        if spec.url is None:
            continue
        check_variable(variable)
        if api_key(variable) is None and variable != KEY:
            raise InvalidInput(
                f"api_key_env (--api-key-env): the variable for {spec.name} is not set, or empty"
            )


def _grader(
    verifier: str | Callable[..., float],
    options: dict[str, Any],
    judge: Model | None,
    max_new_tokens: int,
    concurrency: int,
) -> Grader:
    from pliant.routing.backends import Settings
    from pliant.routing.labels.grading import Grader, JudgeGrader
    from pliant.verify import verifier as named

    if (verifier == "judge") != (judge is not None):
        raise InvalidInput(
            'verifier="judge" and judge=MODEL go together (--verifier judge --judge MODEL)'
        )
    if judge is not None:
        return JudgeGrader(
            judge.backend,
            str(judge.spec),
            Settings(max_new_tokens),
            price=judge.price,
            concurrency=concurrency,
            **options,
        )
    if not isinstance(verifier, str) or ":" in verifier:
        verifier, options = "function", {"function": verifier, **options}
    return Grader(named(verifier, **options))
