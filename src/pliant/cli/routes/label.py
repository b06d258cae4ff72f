"""`pliant route label`: run models over prompts and write down who was right, and at what cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pliant.reports.tables import Table
    from pliant.routing.backends.costs import Price
    from pliant.routing.backends.protocol import ModelSpec, Settings
    from pliant.routing.labels.grading import Grader
    from pliant.routing.labels.label import Labelled
    from pliant.routing.labels.rows import Columns, Model

EXAMPLE = (
    "pliant route label --prompts questions.jsonl --model nano-s --model nano-l --out labels.jsonl"
)


def label(
    prompts: Annotated[str, typer.Option(help="JSONL, CSV, parquet, or a data set (name:split).")],
    model: Annotated[
        list[str],
        typer.Option(help="nano-s, a folder, a hub name, or openai:MODEL@URL; one option each."),
    ],
    out: Annotated[Path, typer.Option(help="The labels (.jsonl); answers are kept beside them.")],
    verifier: Annotated[
        str,
        typer.Option(help="exact, numeric, contains, regex, choice, judge, or grade.py:function."),
    ] = "exact",
    verifier_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the verifier.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="The model of --verifier judge.")] = None,
    prompt_column: Annotated[str, typer.Option(help="A text, or a list of messages.")] = "prompt",
    answer_column: Annotated[str, typer.Option(help="The reference.")] = "answer",
    limit: Annotated[int | None, typer.Option(help="Only the first prompts.", min=1)] = None,
    samples: Annotated[int, typer.Option(help="Answers a prompt, for soft labels.", min=1)] = 1,
    temperature: Annotated[
        float | None, typer.Option(help="Left out: 0 for one sample, 1 for several.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.", min=1)] = 256,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    cost: Annotated[
        str | None,
        typer.Option(help="usd, flops, tokens or ms. Left out: usd by --price, or flops."),
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL=IN,OUT", help="Dollars for a million tokens of each."),
    ] = None,
    api_key_env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[MODEL=]NAME",
            help="The environment variable that holds the key; OPENAI_API_KEY if left out.",
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Calls of a URL at a time.", min=1)] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds that a call may take.")] = 120.0,
    tries: Annotated[int, typer.Option(help="Calls of a URL for one prompt.", min=1)] = 6,
    device: Annotated[str | None, typer.Option(help="Where models run that run here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Run models over prompts: who is right, and at what cost?

    Killed or failed in part, run the same command again: it goes on from where it was. Exit code 2
    if no prompt could be labelled.
    """
    from pliant.cli import terminal
    from pliant.errors import PliantError
    from pliant.routing.backends.protocol import Settings
    from pliant.routing.labels.rows import Columns

    heat = temperature if temperature is not None else (0.0 if samples == 1 else 1.0)
    settings = Settings(max_new_tokens, heat, samples, seed)
    calls = {"concurrency": concurrency, "timeout": timeout, "tries": tries}
    opened = _models([*model, *([judge] if judge else [])], price, api_key_env, calls, device)
    judging = opened.pop() if judge else None
    grader = _grader(verifier, verifier_option or [], judging, settings, concurrency)
    columns = Columns(prompt_column, answer_column)
    done = _labelled(prompts, limit, opened, grader, out, settings, cost, columns)
    if json:
        terminal.print_json(done.as_dict())
    else:
        _draw(done)
    if not done.rows:
        raise PliantError(f"no prompt could be labelled: {_first_failure(done)}")


def _labelled(
    prompts: str,
    limit: int | None,
    models: list[Model],
    grader: Grader,
    out: Path,
    settings: Settings,
    unit: str | None,
    columns: Columns,
) -> Labelled:
    from transformers.utils import logging

    from pliant.cli import terminal
    from pliant.data import read_rows
    from pliant.routing.labels.label import label as make_labels

    logging.disable_progress_bar()
    needed = [columns.prompt] + ([columns.answer] if grader.name != "function" else [])
    rows = read_rows(prompts, needed, limit=limit)
    shown = terminal.track_stream
    return make_labels(
        rows, models, grader, out, settings=settings, unit=unit, columns=columns, progress=shown
    )


# --- what the options mean -----------------------------------------------------------------------


def _models(
    texts: list[str],
    prices: list[str] | None,
    keys: list[str] | None,
    calls: dict[str, Any],
    device: str | None,
) -> list[Model]:
    from pliant.routing.backends.protocol import ModelSpec, different_names, open_backend
    from pliant.routing.backends.remote import KEY
    from pliant.routing.backends.retry import Retry
    from pliant.routing.labels.rows import Model

    specs = [ModelSpec.parse(text) for text in texts]
    different_names(specs)
    priced = _prices(prices or [], specs)
    named = _by_model(keys or [KEY], specs, "--api-key-env", everyone=True)
    remote = {**calls, "retry": Retry(tries=calls["tries"])}
    del remote["tries"]

    def options(spec: ModelSpec) -> dict[str, Any]:
        return {"device": device} if spec.url is None else {**remote, "key_env": named[spec.name]}

    def key_env(spec: ModelSpec) -> str | None:
        return named[spec.name] if spec.url is not None and named[spec.name] != KEY else None

    return [
        Model(spec, open_backend(spec, **options(spec)), priced.get(spec.name), key_env(spec))
        for spec in specs
    ]


def _prices(texts: list[str], specs: list[ModelSpec]) -> dict[str, Price]:
    from pliant.routing.backends.costs import Price

    return {
        name: Price.parse(text)
        for name, text in _by_model(texts, specs, "--price", everyone=False).items()
    }


def _by_model(
    texts: list[str], specs: list[ModelSpec], option: str, everyone: bool
) -> dict[str, str]:
    """`MODEL=VALUE` by model; with `everyone`, a bare value is for all that have none."""
    from pliant.errors import InvalidInput
    from pliant.recipes import nearest

    names = [spec.name for spec in specs]
    found: dict[str, str] = {}
    bare = [text for text in texts if "=" not in text]
    for text in texts:
        name, equals, value = text.rpartition("=")
        if equals and name not in names:
            raise InvalidInput(f"{option} {text}: no model {name!r}{nearest(name, names)}")
        if equals:
            found[name] = value
    if (bare and not everyone) or len(bare) > 1:
        raise InvalidInput(f"{option} {bare[-1]}: say of which model, as in {names[0]}={bare[-1]}")
    if everyone:
        from pliant.routing.backends.remote import KEY

        found = dict.fromkeys(names, bare[0] if bare else KEY) | found
    return found


def _grader(
    name: str,
    options: list[str],
    judge: Model | None,
    settings: Settings,
    concurrency: int,
) -> Grader:
    from pliant.errors import InvalidInput
    from pliant.routing.backends.protocol import Settings as Answering
    from pliant.routing.labels.grading import Grader, JudgeGrader
    from pliant.verify import verifier

    chosen = _options(options)
    if (name == "judge") != (judge is not None):
        raise InvalidInput("--verifier judge and --judge MODEL go together")
    if judge is not None:
        return JudgeGrader(
            judge.backend,
            str(judge.spec),
            Answering(settings.max_new_tokens),
            price=judge.price,
            concurrency=concurrency,
            **chosen,
        )
    if ":" in name:
        name, chosen = "function", {"function": name, **chosen}
    return Grader(verifier(name, **chosen))


def _options(texts: list[str]) -> dict[str, Any]:
    """KEY=VALUE, where a value is a number or true or false if it looks like one."""
    import yaml

    from pliant.errors import InvalidInput

    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise InvalidInput(f"--verifier-option {text!r}: write it as key=value")
        try:
            plain = yaml.safe_load(value)
        except yaml.YAMLError:
            plain = value  # a pattern, say
        found[key.replace("-", "_")] = plain if isinstance(plain, (bool, int, float)) else value
    return found


# --- what is shown -------------------------------------------------------------------------------


def _draw(done: Labelled) -> None:
    from pliant.cli import terminal

    console = terminal.console()
    _table(done).draw(console)
    if done.rows:
        console.print(f"{done.rows:,} labels: {done.path}", markup=False, soft_wrap=True)
    errors = terminal.console(stderr=True)
    for run in done.runs:
        for kind, times in run.failures.items():
            line = f"{run.name}: {times:,} x {kind}; the first: {run.said[kind]}"
            errors.print(" ".join(line.split()), markup=False, soft_wrap=True)
    if done.missing and done.rows:
        line = f"{done.missing:,} prompts are without labels; run the same again to try them again"
        errors.print(line, markup=False, soft_wrap=True)


def _table(done: Labelled) -> Table:
    from pliant.reports.tables import Table, count

    def money(usd: float | None) -> str:
        return "-" if usd is None else f"{usd:.4f}"

    rows = [
        [
            run.name,
            f"{run.answered:,}",
            f"{run.new:,}",
            f"{sum(run.failures.values()):,}",
            f"{run.cut:,}",
            f"{run.right:.3f}" if done.rows else "-",
            f"{run.used.prompt_tokens:,}",
            f"{run.used.answer_tokens:,}",
            f"{run.used.ms / 1000:,.1f}",
            "-" if run.used.flops is None else count(int(run.used.flops)),
            money(run.used.usd),
        ]
        for run in done.runs
    ]
    if done.judging is not None:
        used = done.judging
        tokens = [f"{used.prompt_tokens:,}", f"{used.answer_tokens:,}", f"{used.ms / 1000:,.1f}"]
        rows.append(["judge", f"{used.calls:,}", "", "", "", "", *tokens, "-", money(used.usd)])
    columns = ["model", "answered", "now", "failed", "cut off", "right"]
    columns += ["tokens in", "tokens out", "seconds", "flops", "usd"]
    return Table("Labels", columns, rows, right=frozenset(columns[1:]))


def _first_failure(done: Labelled) -> str:
    said = [message for run in done.runs for message in run.said.values()]
    return said[0] if said else "no model answered"
