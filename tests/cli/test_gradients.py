"""`pliant gradients`, end to end on nano-s: what it compares, what it colours, what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pliant.cli import app
from pliant.cli.gradients.audit import AuditOptions, _top, race_table, sections, steps_table
from pliant.gradients import GradientConfig
from pliant.gradients.audit.contenders import STANDARD, Contender
from pliant.gradients.audit.result import Race, Run

NANO = ["--model", "nano-s", "--data", "nano"]
SMALL = ["--rows", "24", "--batch-size", "4", "--batches", "1", "--draws", "2", "--turns", "1"]


def gradients(*arguments: str, cwd: Path) -> str:
    """What the command prints, run there; in this process, for imports are dear."""
    out = io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out):
        assert app.outcome(["gradients", *arguments]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("audit")
    race = ["--steps", "10", "--seeds", "2", "--held-out", "4", "--page", "audit.html", "--json"]
    done = gradients("audit", *NANO, *SMALL, *race, cwd=folder)
    return json.loads(done), (folder / "audit.html").read_text()


def test_every_contender_is_measured_and_raced(audited: tuple[dict[str, Any], str]) -> None:
    found, ran = audited[0]["audit"], audited[0]["race"]
    names = [finding["name"] for finding in found["findings"]]
    assert names[0] == "sampled .25, sparse" and names[-1] == "standard"
    assert any(name.startswith("random sequences") for name in names)
    assert {"hardest sequences, 25%", "topk .25, exact", "uniform .25, sparse"} <= set(names)
    standard = found["findings"][-1]
    assert standard["cosine"]["value"] == pytest.approx(1) and standard["bias"] < 1e-3
    assert all(f["seconds"] > 0 and f["memory"] > 0 for f in found["findings"])
    assert ran["steps"] == 10 and ran["seeds"] == 2 and ran["conclusive"]
    assert [run["name"] for run in ran["runs"]][-1] == "standard"
    assert ran["winner"] in names and ran["sentence"].startswith(("Train as usual", "Use "))


def test_a_race_of_a_few_steps_prints_no_losses() -> None:
    losses = np.ones((2, 5))
    contenders = [Contender("tokens", GradientConfig()), STANDARD]
    runs = tuple(Run(c, 3, 0.1, 1.0, (((0.0, 2.0), (1.0, 1.0)),) * 2, losses) for c in contenders)
    race = Race(runs, np.full(5, 10), None, 3)
    assert [row[3:5] for row in race_table(race).rows] == [["-", "-"]] * 2
    assert "trained for only 3 steps, and 10 are needed. Give the race more steps." in str(race)
    one = replace(race, runs=tuple(replace(r, steps=10, losses=losses[:1]) for r in runs))
    assert race_table(one).rows[0][4] == "+0.0000 (one seed)"


def test_the_page_says_the_same_without_a_network(audited: tuple[dict[str, Any], str]) -> None:
    found, page = audited
    assert all(a.startswith("#") for a in re.findall(r'(?:href|src)="([^"]*)"', page))
    assert "@import" not in page and "<script" not in page
    assert page.count("<svg") == 1 and page.count("<table") == 2
    assert page.count('class="verdict') == 1 and page.count("<dt>") == 4
    assert found["race"]["winner"] in page and "recommended" in page


def test_tables_and_sentences_are_drawn_of_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, so that what is printed can be held against what was measured."""
    import pliant.gradients.audit as package

    kept: dict[str, Any] = {}
    real = package.audit
    monkeypatch.setattr(package, "audit", lambda *a, **k: kept.setdefault("found", real(*a, **k)))
    monkeypatch.chdir(tmp_path)
    assert app.outcome(["gradients", "audit", *NANO, *SMALL, "--no-race"]) == 0
    printed = capsys.readouterr().out
    found = kept["found"]
    for row in steps_table(found).rows:
        assert "  ".join(row[:1]) in printed and row[1] in printed
    assert found.sentence in printed and len(sections(found, None)) == 1
    losses = np.ones((2, 5))
    contenders = [Contender("tokens", GradientConfig()), STANDARD]
    runs = tuple(Run(c, 3, 0.1, 1.0, (((0.0, 2.0), (1.0, 1.0)),) * 2, losses) for c in contenders)
    short = Race(runs, np.full(5, 10), None, 3)
    top = _top(AuditOptions(model="nano-s", data="nano"), found, short)
    assert top.verdict is not None and top.verdict.kind == "mixed"
    assert [each.label for each in top.figures] == ["speed of a step", "peak memory"], "no gains"
    assert not list(tmp_path.iterdir())


def test_a_lora_is_audited_as_it_would_be_trained(tmp_path: Path) -> None:
    printed = gradients("audit", *NANO, *SMALL, "--no-race", "--lora", "2", "--json", cwd=tmp_path)
    found = json.loads(printed)["audit"]["findings"]
    exact = next(f for f in found if f["name"] == "uniform .25, exact")
    assert exact["variance"] > 0 and json.loads(printed)["race"] is None


def test_the_recommended_one_is_marked_in_the_table() -> None:
    def run(contender: Contender, level: float, steps: int = 10) -> Run:
        losses = level * np.ones((2, 6)) + 0.001 * np.arange(6)
        return Run(contender, steps, 0.1, 1.0, (((0.0, 2.0), (1.0, level)),), losses)

    half = run(Contender("rows", share=0.5), 1.0)
    ran = Race((half, run(STANDARD, 2.0)), np.ones(6, dtype=int), None, 5)
    assert [row[-1] for row in race_table(ran).rows] == ["recommended", ""]
    short = Race((half, run(STANDARD, 2.0, steps=1)), np.ones(6, dtype=int), None, 5)
    assert short.sentence.startswith("Could not tell")
    assert [row[-1] for row in race_table(short).rows] == ["", ""]


def test_show_marks_what_would_be_trained(tmp_path: Path) -> None:
    page = ["--page", "shown.html"]
    done = gradients("show", *NANO, "--rows", "12", "--texts", "3", *page, cwd=tmp_path)
    titles = re.findall(r"Text \d: (\d+) of (\d+) tokens", done)
    assert len(titles) == 3
    body = re.sub(r"Text \d:.*|The same.*", "", done)
    assert len(re.findall(r"\[.+?\]", body)) == sum(int(trained) for trained, _ in titles)
    shown = (tmp_path / "shown.html").read_text()
    assert shown.count('class="marked"') == sum(int(trained) for trained, _ in titles)
    assert "<script" not in shown and "loss " in shown
    again = gradients(
        "show", *NANO, "--rows", "12", "--texts", "3", "--json", "--ratio", "1", cwd=tmp_path
    )
    tokens = [token for text in json.loads(again)["texts"] for token in text]
    assert all(token["trained"] == token["labelled"] for token in tokens)
    assert any(token["labelled"] for token in tokens) and tokens[0]["labelled"] is False


def test_show_reads_plain_text_and_learns_all_but_the_first_token(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("the cat sat on the mat, and the dog sat on the cat. " * 4)
    arguments = ["--model", "nano-s", "--data", "notes.txt", "--length", "64", "--texts", "2"]
    done = gradients("show", *arguments, "--json", "--selection", "topk", cwd=tmp_path)
    for text in json.loads(done)["texts"]:
        assert [token["labelled"] for token in text] == [False] + [True] * (len(text) - 1)
        losses = sorted((token["loss"] for token in text[1:]), reverse=True)
        trained = sorted((t["loss"] for t in text if t["trained"]), reverse=True)
        assert len(trained) == -(-len(losses) // 4)  # a quarter, rounded up


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["audit", *NANO, "--ratio", "0"], "ratio"),
        (["audit", *NANO, "--engine", "swift"], "engine"),
        (["audit", *NANO, "--score", "excess"], "excess"),
        (["audit", *NANO, "--seconds", "1", "--steps", "1"], "one budget"),
        (["audit", *NANO, "--seconds", "inf"], "--seconds: must be a finite number"),
        (["audit", *NANO, "--lr", "inf"], "--lr: must be a finite number"),
        (["audit", *NANO, "--rows", "1"], "1 pieces"),
        (["audit", *NANO, "--length", "100000"], "positions"),
        (["audit", "--model", "nano-s", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["show", "--model", "nano-x", "--data", "nano"], "nano-x"),
        (["show", *NANO, "--choose", "mix"], "name=value"),
        (["show", *NANO, "--page", "."], "."),
        (["shown"], "show"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.outcome(["gradients", *arguments]) == 2
    written = capsys.readouterr()
    (line,) = [line for line in written.err.splitlines() if line.startswith("error: ")]
    assert said in line and "Traceback" not in written.err and not written.out
