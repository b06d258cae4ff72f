"""`pliant route label`: run models over prompts and record which are right, and at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from pliant.cli import terminal
from pliant.cli.shared_options import AnswerColumns
from pliant.errors import InvalidInput, PliantError, did_you_mean
from pliant.loading.dtypes import Dtype
from pliant.options import Flag

if TYPE_CHECKING:
    from pliant.reports.tables import Table
    from pliant.routing.backends import ModelSpec
    from pliant.routing.labels.label import LabelReport


@dataclass(frozen=True, kw_only=True)
class LabelOptions(AnswerColumns):
    prompts: str
    """JSONL, CSV, parquet, or a data set on the hub (name:split)."""
    model: tuple[str, ...]
    """nano-s, a folder, a hub name, or openai:MODEL@URL; repeatable."""
    out: Path
    """The labels (.jsonl); the answers are stored beside them."""
    verifier: str = "exact"
    """exact, numeric, contains, regex, choice, unit_tests, reward_model, judge, or
    grade.py:function."""
    verifier_option: Annotated[tuple[str, ...], Flag(metavar="KEY=VALUE")] = ()
    """An option of the verifier; repeatable."""
    judge: str | None = None
    """The model of --verifier judge."""
    limit: Annotated[int, Ge(1)] | None = None
    """Read only the first prompts."""
    samples: Annotated[int, Ge(1)] = 1
    """Answers per prompt, for soft labels."""
    temperature: float | None = None
    """Default: 0 for one sample, 1 for several."""
    max_new_tokens: Annotated[int, Ge(1)] = 256
    """The longest answer, in tokens."""
    seed: int = 0
    """Seed of the samples."""
    template: str | None = None
    """For models without a chat template: a text with {prompt} in it; \\n is a new line."""
    system: str | None = None
    """A system message before each prompt that has none."""
    stop: tuple[str, ...] = ()
    """Text before which an answer ends; \\n is a new line; repeatable."""
    cost: Literal["usd", "flops", "tokens", "ms"] | None = None
    """What the labels count as cost. Default: usd with --price, else flops."""
    price: Annotated[tuple[str, ...], Flag(metavar="MODEL=IN,OUT")] = ()
    """US dollars per million tokens, in and out; repeatable."""
    api_key_env: Annotated[tuple[str, ...], Flag(metavar="[MODEL=]NAME")] = ()
    """The environment variable that holds the key; OPENAI_API_KEY by default."""
    batch_size: Annotated[int, Ge(1)] | None = None
    """The most prompts that a local model answers at a time. Default: as many as 8,192 tokens."""
    concurrency: Annotated[int, Ge(1)] = 8
    """Simultaneous calls of a URL."""
    timeout: float = 120.0
    """The longest call, in seconds."""
    tries: Annotated[int, Ge(1)] = 6
    """How often to call a URL for one prompt before giving up."""
    device: str | None = None
    """Where local models run: cpu, cuda, ..."""
    dtype: Dtype = "auto"
    """Of local models; auto is the checkpoint's."""
    partial: bool = False
    """Also write prompts that some models failed on, with the grades of the others."""
    json: bool = False
    """Print one JSON document."""


def label(options: LabelOptions) -> None:
    """Run models over prompts: which are right, and at what cost?

    `pliant route fit` needs 50 labels; some hundreds make a better router. After a kill or a
    partial failure, run the same command again: it goes on from there. Exit code 2 if no prompt
    could be labelled.

    Example: pliant route label --prompts questions.jsonl --model nano-s --model nano-l
    --out labels.jsonl
    """
    labelled = _labelled(options)
    if options.json:
        terminal.print_json(labelled.as_dict())
    else:
        _draw(labelled)
    if not labelled.rows:
        messages = (message for run in labelled.models for message in run.messages.values())
        raise PliantError(f"no prompt could be labelled: {next(messages, 'no model answered')}")


_SAME = (
    *("verifier", "judge", "limit", "samples", "temperature"),
    *("max_new_tokens", "seed", "cost", "batch_size", "concurrency", "timeout", "tries"),
    *("device", "dtype", "partial"),
)
"""Options that `pliant.route.label` takes as they are."""


def _labelled(options: LabelOptions) -> LabelReport:
    from pliant import route
    from pliant.routing.backends import BackendWarning, ModelSpec
    from pliant.routing.backends.remote import KEY

    judges = [options.judge] if options.judge else []
    specs = [ModelSpec.parse(text) for text in (*options.model, *judges)]
    template, system, *stop = map(_unescaped, (options.template, options.system, *options.stop))
    prompts, columns = _prompts(options)
    terminal.hide_loading_bars()
    with terminal.shown_warnings(BackendWarning):
        return route.label(
            prompts,
            options.model,
            options.out,
            verifier_options=_verifier_options(options.verifier_option),
            template=template,
            system=system,
            stop=[text or "" for text in stop],
            prices=_by_model(options.price, specs, "--price"),
            api_key_env=_by_model(options.api_key_env, specs, "--api-key-env", default=KEY),
            progress=terminal.track,
            **columns,
            **{name: getattr(options, name) for name in _SAME},
        )


# --- what the options mean -----------------------------------------------------------------------


def _prompts(options: LabelOptions) -> tuple[str | list[dict[str, Any]], dict[str, Any]]:
    """The file of the prompts and its columns; or the rows, whose prompts are in a named column of
    conversations."""
    options.check_columns()
    if options.messages_column is None:
        named = {"prompt": options.prompt_column, "answer": options.answer_column}
        return options.prompts, {f"{name}_column": c for name, c in named.items() if c}
    if Path(options.prompts).expanduser().resolve() == options.out.resolve():
        raise InvalidInput(f"--out {options.out}: it is the file of the prompts: name another")
    # A function of one's own may grade answers without a reference.
    needed = () if ":" in options.verifier else ("answer",)
    return options.read(options.prompts, *needed, limit=options.limit), {}


def _unescaped(text: str | None) -> str | None:
    return None if text is None else text.replace("\\n", "\n")


def _by_model(
    texts: Sequence[str], specs: list[ModelSpec], flag: str, default: str | None = None
) -> dict[str, str]:
    """`MODEL=VALUE` by model; with a default, a bare value replaces the default.

    A value may be a key where the name of its variable belongs, so it is not shown.
    """
    names = [spec.name for spec in specs]
    values: dict[str, str] = {}
    bare = [text for text in texts if "=" not in text]
    for text in texts:
        name, equals, value = text.rpartition("=")
        if equals and name not in names:
            raise InvalidInput(f"{flag}: no model {name!r}{did_you_mean(name, names)}")
        if equals:
            values[name] = value
    if (bare and default is None) or len(bare) > 1:
        shown = bare[-1] if default is None else "NAME"
        raise InvalidInput(f"{flag} {shown}: name its model, as in {names[0]}={shown}")
    if default is not None:
        values = dict.fromkeys(names, bare[0] if bare else default) | values
    return values


def _verifier_options(texts: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE, where a value that looks like a number, true or false is one."""
    import yaml

    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise InvalidInput(f"--verifier-option {text!r}: write it as key=value")
        try:
            plain = yaml.safe_load(value)
        except yaml.YAMLError:
            plain = value  # a pattern, say
        values[key.replace("-", "_")] = plain if isinstance(plain, (bool, int, float)) else value
    return values


# --- what is shown -------------------------------------------------------------------------------


def _draw(done: LabelReport) -> None:
    console = terminal.console()
    _table(done).draw(console)
    if done.rows:
        for sentence in _sentences(done):
            console.print(sentence, markup=False, soft_wrap=True)
    errors = terminal.console(stderr=True)
    for run in done.models:
        for kind, times in run.failures.items():
            line = f"{run.name}: {times:,} x {kind}; the first: {run.messages[kind]}"
            errors.print(" ".join(line.split()), markup=False, soft_wrap=True)
    if done.incomplete:
        line = f"{done.incomplete:,} labels lack the grade of a model that failed (--partial)"
        errors.print(line, markup=False, soft_wrap=True)
    if done.missing and done.rows:
        line = f"{done.missing:,} prompts are without labels; run the same again to try them again"
        errors.print(line, markup=False, soft_wrap=True)


def _sentences(done: LabelReport) -> list[str]:
    """Where the labels are, what they cost, and whether they are enough for a router."""
    from pliant.routing.fitting.splits import FEWEST
    from pliant.routing.units import TOKENIZERS, amount

    cost = "" if done.cost is None else f"; they cost {amount(done.cost, done.unit)}"
    sentences = [f"{done.rows:,} label{'s' * (done.rows != 1)}: {done.path}{cost}"]
    if done.unit == "tokens":
        sentences.append(TOKENIZERS)
    if done.rows < FEWEST:
        missing = f"{FEWEST - done.rows:,} more prompts: label a longer file into the same --out"
        return [*sentences, f"`pliant route fit` needs {FEWEST} labels, so {missing}."]
    return [*sentences, f"Next: pliant route fit --labels {done.path} --out my-router"]


def _table(done: LabelReport) -> Table:
    from pliant.reports.tables import Table
    from pliant.routing.units import amount

    def money(usd: float | None) -> str:
        return "-" if usd is None else amount(usd, "usd")

    rows = [
        [
            run.name,
            f"{run.answered:,}",
            f"{run.new:,}",
            f"{sum(run.failures.values()):,}",
            f"{run.truncated:,}",
            f"{run.right:.3f}" if done.rows else "-",
            f"{run.used.prompt_tokens:,}",
            f"{run.used.answer_tokens:,}",
            f"{run.used.ms / 1000:,.1f}",
            "-" if run.used.flops is None else amount(run.used.flops, "flops"),
            money(run.used.usd),
        ]
        for run in done.models
    ]
    if done.judging is not None:
        used = done.judging
        tokens = [f"{used.prompt_tokens:,}", f"{used.answer_tokens:,}", f"{used.ms / 1000:,.1f}"]
        rows.append(["judge", f"{used.calls:,}", "", "", "", "", *tokens, "-", money(used.usd)])
    columns = ["model", "answered", "now", "failed", "truncated", "right"]
    columns += ["tokens in", "tokens out", "seconds", "FLOPs", "$"]
    return Table("Labels", columns, rows, right=frozenset(columns[1:]))
