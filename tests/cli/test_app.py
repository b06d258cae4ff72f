"""The habits of the command line, tried on the real one: lines, exit codes, terminals and pipes."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pliant import __version__
from pliant.cli import app, terminal
from pliant.errors import InvalidInput

PLIANT = [sys.executable, "-m", "pliant"]


def pliant(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a pipe."""
    return subprocess.run(
        [*PLIANT, *arguments], capture_output=True, text=True, env=os.environ | environment
    )


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """What the command line writes to a terminal of eighty columns."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PLIANT, *arguments],
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"COLUMNS": "80", "TERM": "xterm-256color"} | environment,
    )
    os.close(theirs)
    written = b""
    while chunk := _read(ours):
        written += chunk
    process.wait(timeout=60)
    os.close(ours)
    return written.decode()


def _read(terminal_: int) -> bytes:
    try:
        return os.read(terminal_, 4096)
    except OSError:  # how Linux says that the other end has closed
        return b""


def test_no_arguments_are_a_question_for_help() -> None:
    assert pliant().stdout == pliant("--help").stdout
    assert pliant().returncode == 0


def test_help_lists_every_command() -> None:
    text = pliant("--help").stdout
    for name, line in app.COMMANDS.items():
        assert name in text
        assert line in text, "truncated, for a line of help has about sixty characters"


@pytest.mark.parametrize("command", [*app.names(), *app.GROUPS])
def test_each_command_has_help_with_an_example(command: str) -> None:
    done = pliant(*command.split(), "--help")
    assert done.returncode == 0
    assert f"Example: pliant {command} " in " ".join(done.stdout.split())


@pytest.mark.parametrize("group", app.GROUPS)
def test_a_group_alone_is_a_question_for_its_help(group: str) -> None:
    done = pliant(group)
    assert done.stdout == pliant(group, "--help").stdout
    assert done.returncode == 0
    for name in app.names():
        outer, _, inner = name.partition(" ")
        assert outer != group or inner in done.stdout


def test_the_version_is_one_line() -> None:
    assert pliant("--version").stdout == f"pliant {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["docter", "x"], "Did you mean 'doctor'"),
        (["--wrong"], "--wrong"),
        (["doctor", "x", "--jsn"], "--json"),
        (["doctor"], "MODEL"),
        (["route", "lable"], "Did you mean 'label'"),
        (["route", "--wrong"], "--wrong. See pliant route --help"),
        (["doctor", "./nowhere"], "no such folder"),
        (["run", "nowhere.yaml"], "No such file or directory: nowhere.yaml"),
    ],
    ids=" ".join,
)
def test_an_error_is_one_line_on_stderr_and_exit_code_two(arguments: list[str], said: str) -> None:
    done = pliant(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert said.lower() in done.stderr.lower()


def test_a_traceback_comes_only_with_debug() -> None:
    assert "Traceback" not in pliant("doctor", "./nowhere").stderr
    for arguments in (["--debug", "doctor", "./nowhere"], ["doctor", "./nowhere", "--debug"]):
        done = pliant(*arguments)
        assert "Traceback" in done.stderr
        assert done.returncode == 2


def test_a_pipe_has_no_colours_and_no_boxes() -> None:
    for arguments in (["--help"], ["doctor", "--help"], ["doctor", "./nowhere"]):
        done = pliant(*arguments)
        assert (done.stdout + done.stderr).isascii()
        assert "\x1b" not in done.stdout + done.stderr


def test_a_terminal_has_colours_unless_no_color_is_set() -> None:
    assert "\x1b[" in on_a_terminal("doctor", "./nowhere")
    plain = on_a_terminal("doctor", "./nowhere", NO_COLOR="1")
    assert "\x1b[3" not in plain and "\x1b[1;3" not in plain


def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [*PLIANT, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141
    process.stderr.close()


def test_an_interrupt_ends_with_130(tmp_path: Path) -> None:
    """A recipe that is a pipe nobody writes to: the command waits until it is interrupted."""
    recipe = tmp_path / "recipe.yaml"
    os.mkfifo(recipe)
    process = subprocess.Popen(
        [*PLIANT, "run", str(recipe)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    writer = os.open(recipe, os.O_WRONLY)  # returns once the command has opened its end
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    os.close(writer)
    assert process.returncode == 130
    assert errors == "error: interrupted\n"


def heed_interrupts() -> None:
    """In the child: it would inherit that SIGINT is ignored, as it is in a background job."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_fault_of_our_own_is_told_from_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    assert not app.is_the_users(KeyError("x"))
    assert app.is_the_users(InvalidInput("x"))
    assert "please report it" in app.explanation(KeyError("x"))


def test_a_complaint_is_one_line_whatever_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.complain("a [bold]b[/bold]\n  c " + "d" * 200)
    assert capsys.readouterr().err == "error: a [bold]b[/bold] c " + "d" * 200 + "\n"


def test_json_has_no_value_that_json_has_not() -> None:
    with pytest.raises(ValueError, match="JSON"):
        terminal.print_json({"x": float("nan")})


def test_progress_in_a_pipe_is_a_line_for_the_first_and_for_every_fifth(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(terminal.track(range(1000), "counting")) == list(range(1000))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and re.fullmatch(r"counting: 1 of 1000, about \d+ s left", lines[0])
    assert re.fullmatch(r"counting: 1000 of 1000, took \d+ s", lines[-1])


def test_a_hundred_stages_print_a_dozen_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with terminal.Stages() as stages:
        for way in range(100):
            for done in range(1, 31):
                stages(f"way {way}", done, 30)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 13 and re.fullmatch(r"way 0: 1/30, about \d+ s left", lines[0])
    assert [line.split(":")[0] for line in lines[1:5]] == ["way 1", "way 2", "way 3", "way 5"]
