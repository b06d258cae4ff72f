"""`pliant expert classify | mix | ask`: bad input is refused first, and good input is answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.experts.adapting_models import nano_with_experts, questions
from tests.experts.models import with_experts

from pliant import nano
from pliant.cli.app import outcome
from pliant.data import write_rows
from pliant.experts.adapting import generate, load_experts

QUICK = ["--population", "6", "--iterations", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts, solved examples, and prompts labelled with their experts."""
    folder = tmp_path_factory.mktemp("experts")
    nano_with_experts(2)[0].save_pretrained(folder / "both")
    known = questions("train", 12, ["sort", "add", "largest"])
    expert = {"sort": "words", "add": "sums", "largest": "base"}
    write_rows(
        folder / "labelled.jsonl",
        [{"prompt": q.prompt, "expert": expert[q.family]} for q in known],
    )
    solved = questions("train", 8, ["sort"])
    write_rows(folder / "solved.jsonl", [{"prompt": q.prompt, "answer": q.answer} for q in solved])
    write_rows(folder / "long.jsonl", [{"prompt": "1+" * 1500, "answer": "1"}])
    write_rows(folder / "odd.jsonl", [{"prompt": 7, "answer": "7"}] * 3)
    write_rows(folder / "none.jsonl", [{"prompt": "1+1", "answer": None}])
    (folder / "dangling").symlink_to("nothing")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> Any:
    assert outcome(["expert", *map(str, words), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_prompts_pick_their_experts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = folder / "head"
    both = ["--experts", folder / "both"]
    fitted = run(capsys, "classify", *both, "--data", folder / "labelled.jsonl", "--out", head)
    assert fitted["accuracy"] >= 0.8
    choices = run(
        capsys, "classify", *both, "--data", folder / "labelled.jsonl", "--classifier", head
    )
    assert choices["accuracy"] >= 0.9
    prompts = ["17+4", "sort dcab"]
    answers = run(capsys, "ask", *prompts, *both, "--classifier", head)
    assert [row["expert"] for row in answers] == ["sums", "words"]
    model = load_experts(nano.load("nano-s")[0], [folder / "both"])
    tokenizer = nano.load("nano-s")[1]
    mixtures = [{"sums": 1.0}, {"words": 1.0}]
    assert [row["answer"] for row in answers] == generate(model, tokenizer, prompts, mixtures)
    assert outcome(["expert", "ask", "17+4", "--experts", str(folder / "both")]) == 0
    printed = capsys.readouterr().out
    assert "| the model finds" in printed
    table = ["classify", *both, "--data", folder / "labelled.jsonl"]
    assert outcome(["expert", *map(str, table)]) == 0
    assert "of 36 prompts are classified right" in capsys.readouterr().out


def test_a_mixture_is_written_and_loads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "mixed"
    words = ["--experts", folder / "both", "--data", folder / "solved.jsonl", *QUICK]
    page = folder / "mixed.html"
    search = ["--shots", 4, "--scope", "layer", "--l1", 0]
    report = run(capsys, "mix", *words, *search, "--out", out, "--report", page)
    assert report["shots"] == 4
    assert set(report["test"]) == {"base", "words", "sums", "mixture"}
    assert report["mixture"] and report["folder"] == str(out)
    model, tokenizer = nano_with_experts(2)
    prompts = ["sort dcab", "17+4"]
    mixed = load_experts(nano.load("nano-s")[0], [out])
    texts = generate(mixed, tokenizer, prompts, [{"mixed": 1.0}] * 2)
    assert texts == generate(model, tokenizer, prompts, [report["mixture"]] * 2)
    shown = page.read_text()
    assert shown.count("<svg") == 3  # the coefficients in each layer, the search, the test
    assert "log-likelihood, a token" in shown and "Right answers to 4 prompts" in shown
    assert shown.count('class="verdict') == 1 and "Not shown to be better" in shown
    more = ["--reward", "exact", "--report", page]
    assert outcome(["expert", "mix", *map(str, [*words, *more])]) == 0
    assert "the best of" in capsys.readouterr().out
    shown = page.read_text()
    assert shown.count("<svg") == 2 and "mean reward (exact)" in shown  # nothing is tested


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("ask 17+4", "there are no experts"),
        ("ask 17+4 -e nowhere", "nowhere: no expert here"),
        ("ask 17+4 -e both -e large", "experts of different bases cannot be mixed"),
        ("ask 17+4 -e both -e large --base nano-s", "trained on another base (nano-l)"),
        ("ask 17+4 -e both --by classifier", "needs a fitted head"),
        ("ask 17+4 -e both --classifier nowhere", "nowhere: no such folder"),
        ("ask 17+4 -e both --classifier both/words", "has no pliant.json"),
        ("ask 17+4 -e both --label law=legal", "--label law: no such expert"),
        ("ask 17+4 -e both --label law", "write it as name=text"),
        ("classify -e both --data labelled.jsonl --out both", "exists already"),
        ("classify -e both --data solved.jsonl --out new", "no column 'expert'"),
        ("classify -e both --out new", "--out needs --data"),
        ("mix -e both", "there are no examples"),
        ("mix -e both --data labelled.jsonl --out new", "no column 'answer'"),
        ("mix -e both --data solved.jsonl --test solved.jsonl --out new", "are shots too"),
        ("mix -e both --data solved.jsonl --shots 8 --out new", "leave none to test on"),
        ("mix -e both --data solved.jsonl --report both --out new", "both is a folder"),
        ("mix -e both --data solved.jsonl --reward best --out new", "no reward 'best'"),
        ("mix -e both -e large --data solved.jsonl --out new", "experts of different bases"),
        ("ask 17+4 -e nowhere --base nano-x", "nowhere: no expert here"),
        ("mix -e both --data solved.jsonl --test odd.jsonl", "prompt 7 is neither a text nor a"),
        ("mix -e both --data odd.jsonl --shots 1", "prompt 7 is neither a text nor a list of"),
        ("mix -e both --data none.jsonl --out new", "shot 0: the answer None is neither text"),
        ("mix -e both --data solved.jsonl --out dangling", "dangling exists already"),
        ("mix -e both --data solved.jsonl --seed -1", "seed = -1: give a whole number, 0 or more"),
        ("classify -e both --data long.jsonl", "longer than the model's context of 2,048"),
        ("ask 17+4 -e both --max-new-tokens 9999", "and an answer of up to 9,999: longer than"),
        ("mix -e both --data long.jsonl --out new", "longer than the model's context of 2,048"),
        (
            "mix -e both --data solved.jsonl --max-new-tokens 2048 --reward exact --out new",
            "and an answer of up to 2,048: longer than",
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    message: str,
) -> None:
    if not (folder / "large").exists():
        with_experts("far", model=nano.load("nano-l")[0], rank=2).save_pretrained(folder / "large")
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert outcome(["expert", *words.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(folder.rglob("*")) == before
