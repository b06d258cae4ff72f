"""The card's figures come from the very models, in whatever order they are named."""

import json
import shutil
import sys

import pytest

from pliant import nano
from pliant.cli.terminal import progress
from pliant.nano.evaluate import __main__ as evaluate
from pliant.nano.evaluate.__main__ import main


@pytest.fixture(autouse=True)
def _few_questions(monkeypatch):
    monkeypatch.setattr(evaluate, "TEST_QUESTIONS", 60)
    monkeypatch.setattr(evaluate, "HELD_OUT_QUESTIONS", 12)


@pytest.fixture
def weights(tmp_path):
    """A copy of the small model under both names: what one gets right, the other does."""
    for name in nano.NAMES:
        shutil.copytree(nano.path("nano-s"), tmp_path / name)
        for card in ("README.md", "accuracy.json"):
            (tmp_path / name / card).unlink(missing_ok=True)
    return tmp_path


def test_a_card_says_what_was_measured(weights, capsys):
    main(["nano-s", "--weights", str(weights), "--write", "--device", "cpu"])
    figures = json.loads((weights / "nano-s" / "accuracy.json").read_text())
    asked, unseen = evaluate.card_questions()
    found = evaluate.measure("nano-s", [*asked, *unseen], weights)
    assert figures["questions"] == len(asked) == 60
    assert figures["accuracy"] == found.split(60)[0].share()
    assert f"{figures['accuracy']:.3f}" in (weights / "nano-s" / "README.md").read_text()
    assert set(figures["held_out"]) == {family.name for family in nano.HELD_OUT}
    assert not (weights / "nano-l" / "README.md").exists()
    assert f"nano-s: {figures['accuracy']:.4f} of 60" in capsys.readouterr().out


def test_the_order_of_the_names_does_not_turn_the_models_round(monkeypatch, capsys):
    """nano-s is right on all, nano-l on none."""

    def all_or_none(name, questions, *_):
        return evaluate.Accuracy(tuple(questions), (name == "nano-s",) * len(questions))

    monkeypatch.setattr(evaluate, "measure", all_or_none)
    main(["nano-l", "nano-s"])
    said = capsys.readouterr().out
    assert "only nano-s right: 1.0000; only nano-l right: 0.0000" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nano-m"], "nano-m"),
        (["--weights", "{folder}/nowhere"], "no such folder"),
        (["--device", "abacus"], "abacus"),
        (["--seed", "x"], "--seed"),
    ],
)
def test_a_wrong_call_costs_one_line(tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as end:
        main([word.format(folder=tmp_path) for word in arguments])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_ctrl_c_ends_with_one_line_and_130(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "measure", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["nano-s"])
    assert end.value.code == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: interrupted")


def test_on_a_terminal_progress_is_a_bar_and_in_a_pipe_a_line_now_and_then(monkeypatch, capsys):
    def count():
        with progress("counting", 4, every=2) as tell:
            for done in range(1, 5):
                tell(done, f"at {done}")
        return capsys.readouterr()

    plain = count()
    assert plain.err == "counting: 2/4 at 2\ncounting: 4/4 at 4\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    drawn = count()
    assert "4/4" in drawn.err and "at 4" in drawn.err and "━" in drawn.err
    assert plain.out == drawn.out == ""
