"""What a command's help shows: options under headings, with their choices and defaults, as wide as
the terminal; and how a shell completes a line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any, get_args

import pytest

from pliant import options
from pliant.cli import app, flags, importance, prune, recover, shared_options
from pliant.cli.expert import train as expert_train
from pliant.cli.route import fit as route_fit
from pliant.cli.route import label as route_label
from pliant.loading import Dtype

COMMANDS = [name for name in app.names() if name not in ("run", *app.GROUPS)]


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert app.outcome([*command.split(), "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_stands_once_under_a_heading(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    text = help_of(command, capsys)
    headings = re.findall(r"^(\w+):$", text, re.M)
    own = [heading for heading in headings if heading != "Arguments"]
    assert own == [heading for heading in flags.HEADINGS if heading in own]
    for option in options.of(app.command_function(command)):
        if not (option.flag.positional or option.flag.hidden):
            name = "--" + option.name.replace("_", "-")
            first = rf"^  (-\w, )?{name}(?=[ ,/]|$)"
            assert len(re.findall(first, text, re.M)) == 1, option.name


def test_every_dtype_is_of_one_closed_set_and_checked_before_the_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    named = []
    for command in COMMANDS:
        for option in options.of(app.command_function(command)):
            if option.name == "dtype":
                named.append(command)
                assert option.choices == get_args(Dtype), command
                assert app.outcome([*command.split(), "--dtype", "flaot32"]) == 2
                assert "'bfloat16'" in capsys.readouterr().err
    assert len(named) > 12


def test_columns_of_labels_stand_under_one_heading() -> None:
    read = {o.name: flags.heading(o) for o in options.of(route_fit.fit)}
    columns = [name for name in read if name.endswith("_column")]
    assert len(columns) == 7
    assert {read[name] for name in (*columns, "unit")} == {"Input"}


def test_a_field_may_name_another_heading_than_its_name_does() -> None:
    """Rows are what a command reads, and of a scorer the number of [CPX] positions."""
    headings = {}
    for command in ("train lm", "train scorer"):
        (rows,) = (o for o in options.of(app.command_function(command)) if o.name == "rows")
        headings[command] = flags.heading(rows)
    assert headings == {"train lm": "Input", "train scorer": "Method"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("route")])
def test_every_default_and_choice_is_shown(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    entries = re.split(r"^  (?=-)", help_of(command, capsys), flags=re.M)
    for option in options.of(app.command_function(command)):
        if option.flag.hidden or option.required or option.flag.positional:
            continue
        name = "--" + option.name.replace("_", "-")
        (line,) = (e for e in entries if re.match(rf"(-\w, )?{name}(?=[ ,/\n]|$)", e))
        choices = [str(choice) for choice in option.choices or get_args(option.item_type)]
        assert "|".join(choices) in line or ", ".join(choices) in line, line
        if option.default in (None, (), ""):
            assert re.search(r"[Dd]efault: |[Nn]eeded|none: |Left out: ", option.help), line
        elif option.default is not False:
            assert "[default: " in line, line


def test_a_help_is_as_wide_as_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in (80, 140):
        monkeypatch.setenv("COLUMNS", str(columns))
        longest = max(map(len, help_of("prune", capsys).splitlines()))
        assert columns - 15 < longest <= columns


def test_closed_sets_of_values_are_those_of_the_parts() -> None:
    from pliant.experts.training import config as expert
    from pliant.gradients import config as gradients
    from pliant.routing import units
    from pliant.routing.labels import label
    from pliant.routing.metrics import calibration
    from pliant.structure import config as structure
    from pliant.structure.pruning import costs
    from pliant.structure.ranking import measures
    from pliant.structure.recovery import trained_weights

    def type_of(name: str, command: Any) -> Any:
        return next(o.type for o in options.of(command) if o.name == name)

    for ours, theirs in (
        (shared_options.Engine, gradients.Engine),
        (shared_options.Selection, gradients.Selection),
        (shared_options.TokenScore, gradients.Score),
        (importance.Kind, structure.Kind),
        (importance.Score, measures.Score),
        (prune.Part, structure.Part),
        (prune.PruneScore, structure.PruneScore),
        (type_of("budget_of", prune.prune), costs.Cost),
        (type_of("train", recover.recover), trained_weights.Train),
        (expert_train.Method, expert.Method),
    ):
        assert set(get_args(ours)) == set(get_args(theirs)), ours
    for ours, names in (
        (type_of("calibration", route_fit.fit), calibration.CALIBRATIONS),
        (type_of("unit", route_fit.evaluate), units.UNITS),
        (type_of("cost", route_label.label), label.UNITS),
    ):
        assert set(get_args(ours)) == set(names), ours


def test_defaults_of_the_command_line_are_those_of_the_parts() -> None:
    from pliant.experts.training.config import ExpertTrainingConfig
    from pliant.gradients.config import GradientConfig

    own = expert_train.TrainOptions(base="nano-s", task="x", out="y")  # type: ignore[arg-type]
    assert own.config() == ExpertTrainingConfig()
    from pliant.cli.gradients.audit import AuditOptions

    assert AuditOptions(model="nano-s", data="nano").config() == GradientConfig()


# --- completion ----------------------------------------------------------------------------------


def completed(line: str, shell: str = "bash") -> list[str]:
    """What a shell offers after this line, and that it did not wait for torch."""
    words = line.split(" ")
    code = "import sys; from pliant.cli.app import main\ntry: main()\n"
    code += "finally: assert 'torch' not in sys.modules"
    environment = {"_PLIANT_COMPLETE": f"complete_{shell}", "COMP_WORDS": line}
    environment |= {"COMP_CWORD": str(len(words) - 1), "_TYPER_COMPLETE_ARGS": line}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n") if shell == "bash" else [done.stdout]


def test_a_shell_completes_commands_options_and_choices() -> None:
    assert {"doctor", "prune"} <= {line.strip() for line in completed("pliant ")}
    assert [line.strip() for line in completed("pliant pru")] == ["prune", ""]
    assert "fit" in [line.strip() for line in completed("pliant route f")]
    assert "--budget-of" in [line.strip() for line in completed("pliant prune --budget")]
    assert "latency" in [line.strip() for line in completed("pliant prune --budget-of l")]
    assert "--engine" in [line.strip() for line in completed("pliant train --eng")]
    (zsh,) = completed("pliant gradients audit --rat", "zsh")
    assert "--ratio" in zsh
