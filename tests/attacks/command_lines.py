"""Command lines of every command, drawn from its real options: a good one, then a few changes.

Most are wrong in a way that a user, a script or an enemy can bring about.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.attacks.values import hostile_texts, stdin_contents, yaml_values

from pliant import options
from pliant.cli import app
from pliant.options import Option

Values = dict[str, Any]
"""By option: a text, a truth value, or several texts."""
STEP = ["max_steps=1", "per_device_train_batch_size=2", "use_cpu=true"]
TEXT = {"model": "nano-s", "data": "../data/few.jsonl", "rows": "3", "length": "32"}
EXPERTS = {"experts": ["../ours/experts"], "device": "cpu"}
SELECTED = {**TEXT, "engine": "exact"}
GOOD: Mapping[str, Values] = {
    "demo": {"questions": "50", "steps": "1", "page": "demo.html"},
    "doctor": {"model": "nano-s"},
    "export": {"model": "nano-s", "adapters": ["../ours/gates"], "out": "new"},
    "importance": {"model": "nano-s", "tokens": "60", "length": "32", "score": "magnitude"},
    "prune": {"model": "nano-s", "heads": "0.34", "controls": False, "tokens": "600"},
    "recover": {"teacher": "nano-s", "out": "new", "set": STEP, "train": "lora", **TEXT},
    "run": {"recipe": "recipe.yaml"},
    "score": {"scorer": "../ours/scorer", "prompts": ["2+2"]},
    "train": {**SELECTED, "out": "new", "set": STEP},
    "train lm": {**SELECTED, "out": "new", "set": STEP},
    "train scorer": {
        "data": "../data/questions.jsonl",
        "output_dir": "new",
        "num_epochs": "1",
        "batch_size": "4",
        "device": "cpu",
    },
    "expert train": {
        "base": "nano-s",
        "task": "../data/questions.jsonl",
        "out": "new",
        "steps": "1",
        "max_new_tokens": "2",
        "device": "cpu",
        "set": ["prompts=2", "group=2", "parts=mlp", "rank=1"],
    },
    "expert list": {"folder": "../ours/experts"},
    "expert show": {"expert": "../ours/experts/words"},
    "expert classify": {**EXPERTS, "prompt": ["2+2"]},
    "expert mix": {
        **EXPERTS,
        "data": "../data/few.jsonl",
        "population": "2",
        "iterations": "1",
        "max_new_tokens": "2",
    },
    "expert ask": {**EXPERTS, "prompt": ["2+2"], "max_new_tokens": "2"},
    "expert merge": {"expert": "../ours/experts/words", "out": "new"},
    "expert export-lora": {"expert": "../ours/experts/words", "out": "new", "rank": "1"},
    "gradients audit": {
        **SELECTED,
        "batch_size": "2",
        "batches": "1",
        "draws": "2",
        "turns": "1",
        "race": False,
        "held_out": "1",
    },
    "gradients show": {**SELECTED, "texts": "1"},
    "models list": {},
    "models get": {"names": ["smollm2-135m"]},
    "models path": {"name": "smollm2-135m"},
    "models remove": {"name": "smollm2-135m"},
    "route ask": {"router": "../ours/router", "prompt": "2+2", "max_new_tokens": "2"},
    "route calibrate": {
        "router": "../ours/router",
        "labels": "../data/labels.jsonl",
        "force": True,
    },
    "route evaluate": {"router": "../ours/router", "labels": "../data/labels.jsonl"},
    "route fit": {
        "labels": "../data/labels.jsonl",
        "out": "new",
        "scorer": ["length"],
        "force": True,
    },
    "route grade": {"router": "../ours/router", "grades": "../data/grades.jsonl"},
    "route learn": {"router": "../ours/router", "labels_out": "new.jsonl"},
    "route label": {
        "prompts": "../data/few.jsonl",
        "model": ["nano-s"],
        "out": "new.jsonl",
        "max_new_tokens": "2",
        "device": "cpu",
    },
    "route report": {
        "router": "../ours/router",
        "labels": "../data/labels.jsonl",
        "out": "report.html",
    },
}

NEEDS_A_DOWNLOAD = ("models get", "models path", "models remove")
"""Commands whose good line fails here: there is no network."""
SLOW = ("demo", "gradients audit", "recover", "route evaluate", "route fit", "route learn")
SLOW += (
    "route report",
    "train",
    "train lm",
    "train scorer",
    "expert train",
    "expert mix",
    "expert merge",
    "prune",
)
"""Commands whose good line takes more than a quarter of a second."""
WORKS = ("demo", "recover", "run", "train", "train lm", "train scorer", "expert train")
WORKS += ("expert mix", "gradients audit", "prune", "importance")
"""Commands that options may ask for more than a few seconds of work."""


@dataclass(frozen=True)
class CommandLine:
    command: str
    words: tuple[str, ...]
    stdin: bytes = b""
    files: Mapping[str, str] = field(default_factory=dict)
    """In the working folder: recipes."""

    @property
    def may_work(self) -> bool:
        return self.command in WORKS

    def prepare(self, cwd: Path) -> None:
        for name, content in self.files.items():
            (cwd / name).write_text(content)

    def __str__(self) -> str:
        note = "".join(f"; {name}: {content!r}" for name, content in self.files.items())
        note += f"; stdin: {self.stdin!r}" if self.stdin else ""
        return " ".join(word if word.isalnum() else repr(word) for word in self.words)[:400] + note


def good_lines(slow: bool) -> list[CommandLine]:
    """The good line of each command that needs no network."""
    left_out = NEEDS_A_DOWNLOAD if slow else (*NEEDS_A_DOWNLOAD, *SLOW)
    recipe = {"recipe.yaml": "command: doctor\nmodel: nano-s\n"}
    return [
        CommandLine(command, tuple(_words(command, values)), files=recipe)
        for command, values in GOOD.items()
        if command not in left_out
    ]


def draw(count: int) -> list[CommandLine]:
    """So many command lines, always the same, of all commands in turn."""
    commands = app.names()
    share = -(-count // len(commands))
    drawn = [_different(_examples(command, 3 * share))[:share] for command in commands]
    rounds = zip_longest(*drawn)
    return [line for lines in rounds for line in lines if line is not None][:count]


def _different(lines: Iterable[CommandLine]) -> list[CommandLine]:
    return list({repr(line): line for line in lines}.values())


def _examples(command: str, count: int) -> Iterator[CommandLine]:
    lines: list[CommandLine] = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(command_lines(command))
    def collect(line: CommandLine) -> None:
        lines.append(line)

    collect()
    yield from lines


@st.composite
def command_lines(draw: st.DrawFn, command: str) -> CommandLine:
    """A good command line with up to three values replaced, taken away or added."""
    if command == "run":
        return draw(recipes())
    values = draw(changed(command))
    words = _words(command, values)
    if draw(st.integers(0, 19)) == 0:
        odd = st.sampled_from(["--help", "--nonesuch", "-x", "--", "", "\udc80", "--json=yes"])
        words.insert(draw(st.integers(0, len(words))), draw(odd))
    return CommandLine(command, tuple(words), draw(stdin_contents()))


@st.composite
def changed(draw: st.DrawFn, command: str) -> Values:
    values = dict(GOOD[command])
    known = _options(command)
    for _ in range(draw(st.sampled_from([1, 1, 2, 2, 3, 0]))):
        option = draw(st.sampled_from(known))
        if draw(st.integers(0, 9)) == 0:
            values.pop(option.name, None)
        else:
            values[option.name] = draw(hostile(option))
    return values


def hostile(option: Option) -> st.SearchStrategy[Any]:
    if option.type is bool:
        return st.booleans()
    texts = hostile_texts(option)
    if option.item_type is None:
        return texts
    added = [value for values in GOOD.values() for value in values.get(option.name, [])]
    both = texts if not added else texts | st.sampled_from(added)
    return st.lists(both, min_size=1, max_size=3)


@st.composite
def recipes(draw: st.DrawFn) -> CommandLine:
    """A command from a recipe, in which values have types, and changes of it by --set."""
    command = draw(st.sampled_from([name for name in GOOD if name != "run"]))
    content: Values = {"command": command}
    for name, value in draw(changed(command)).items():
        content[name] = draw(yaml_values()) if draw(st.integers(0, 3)) == 0 else _typed(value)
    words, files = ["run", "recipe.yaml"], {"recipe.yaml": json.dumps(content)}
    kind = draw(st.integers(0, 9))
    if kind == 0:
        words[1] = draw(hostile_texts(_option("run", "recipe")))
    for text in draw(st.lists(hostile_texts(_option("run", "set")), max_size=2)):
        name = draw(st.sampled_from(_options(command))).name
        words += [f"--set={text}"] if kind < 5 else [f"--set={name}={text}"]
    return CommandLine("run", tuple(words), draw(stdin_contents()), files)


def _typed(value: Any) -> Any:
    """As a recipe writes it: numbers are numbers."""
    if isinstance(value, list):
        return value
    try:
        return json.loads(value)
    except (TypeError, ValueError):
        return value


def _words(command: str, values: Values) -> list[str]:
    words, places = command.split(), []
    for option in _options(command):
        value = values.get(option.name)
        flag = "--" + option.name.replace("_", "-")
        if value is None:
            continue
        if option.name == "other" and "--with" in option.flag.aliases:
            flag = "--with"
        if option.flag.positional:
            places += value if isinstance(value, list) else [value]
        elif isinstance(value, bool):
            words += [flag] if value else [f"--no-{flag[2:]}"] * bool(option.default)
        else:
            words += [f"{flag}={text}" for text in (value if isinstance(value, list) else [value])]
    return words + places


@cache
def _options(command: str) -> tuple[Option, ...]:
    return options.of(app.command_function(command))


def _option(command: str, name: str) -> Option:
    return next(option for option in _options(command) if option.name == name)
