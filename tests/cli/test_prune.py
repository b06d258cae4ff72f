"""`pliant prune`: bad input is refused before a model is loaded, and a smaller model comes out."""

from __future__ import annotations

import json
import shlex
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import Program
from tests.structure.pruning.test_prune import text
from transformers import AutoModelForCausalLM, AutoTokenizer

from pliant import load
from pliant.anatomy.tiny import tiny_model
from pliant.cli.app import outcome
from pliant.cli.prune import PruneOptions
from pliant.cli.prune.page import gates_of
from pliant.cli.prune.saved import plan_of
from pliant.structure import PruneConfig, prune

SMALL = ["--tokens", "2000", "--length", "64", "--batch-size", "4"]


def test_a_smaller_stock_model_comes_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "smaller"
    assert outcome(["prune", "nano-s", "--budget", "0.2", "--out", str(out), "--json", *SMALL]) == 0
    report = json.loads(capsys.readouterr().out)
    again = AutoModelForCausalLM.from_pretrained(out)
    whole = load("nano-s")[0]
    before, after = (sum(p.numel() for p in m.parameters()) for m in (whole, again))
    assert 1 - after / before == pytest.approx(0.2, abs=0.02)
    assert report["export"]["parameters"] == after
    assert report["export"]["difference"] <= report["export"]["bound"]
    assert AutoTokenizer.from_pretrained(out)("what is 1+1?")["input_ids"]
    points = report["plan"]["points"]
    assert {point["config"]["score"] for point in points} == {"error", "random", "magnitude"}
    assert {part for part in ("heads", "channels", "layers") for p in points if p["config"][part]}
    best = [p for p in points if p["config"] == report["plan"]["config"]]
    assert best[0]["saved"] >= 0.19
    enough = [p for p in points if p["saved"] >= 0.19 and p["config"]["compensate"]]
    assert best[0]["perplexity"] == min(point["perplexity"] for point in enough)


def test_the_table_says_what_was_lost(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(["prune", "nano-s", "--heads", "0.34", "--no-controls", *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "33% of heads by error, compensated" in printed  # one of three groups
    assert "34%" not in printed and "saved" in printed
    assert "random" not in printed


def test_layers_may_lose_different_shares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gates, out = tmp_path / "gates", tmp_path / "smaller"
    command = ["prune", "nano-s", "--channels", "0.25", "--no-uniform", "--no-controls", "--json"]
    places = ["--adapters", str(gates), "--zeros", "--out", str(out)]
    assert outcome([*command, *places, *SMALL]) == 0
    report = json.loads(capsys.readouterr().out)
    counts = {len(units) for units in report["removed"]["channels"].values()}
    removed, zeroed = (report["export"][name].get("channels", 0) for name in ("removed", "zeroed"))
    assert len(counts) > 1 and removed + zeroed == 96 and zeroed
    again = tmp_path / "again"
    command = ["export", "nano-s", "--adapters", str(gates), "--out", str(again)]
    assert outcome(command) == 2
    assert "layers lose different shares" in capsys.readouterr().err
    assert outcome([*command, "--zeros", "--stream"]) == 0
    first, second = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (out, again))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_more_is_lost_without_compensation(capsys: pytest.CaptureFixture[str]) -> None:
    perplexities = []
    for extra in ([], ["--no-compensate"]):
        command = ["prune", "nano-s", "--channels", "0.5", "--json", "--no-controls"]
        assert outcome([*command, *extra, *SMALL]) == 0
        plan = json.loads(capsys.readouterr().out)["plan"]
        perplexities.append((plan["whole"], max(p["perplexity"] for p in plan["points"])))
    assert perplexities[0][0] == perplexities[1][0]
    assert perplexities[0][1] < perplexities[1][1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nano-s"], "give --budget, or shares of"),
        (["nano-s", "--budget", "0.2", "--heads", "0.5"], "give --budget, or"),
        (["nano-s", "--budget", "1.5"], "budget = 1.5"),
        (["nano-s", "--budget", "0.2", "--budget-of", "money"], "'money' is not one of"),
        (["nano-s", "--budget", "0.2", "--parts", "tails"], "'tails' is not one of 'experts'"),
        (["nano-s", "--channels", "0.2", "--parts", "heads"], "give a budget"),
        (["nano-s", "--budget", "0.9", "--parts", "channels"], "more than channels can give"),
        (["nano-s", "--budget", "0.2", "--parts", "experts"], "no experts"),
        (["nano-s", "--channels", "0.2", "--budget-of", "flops"], "give a budget"),
        (["nano-s", "--channels", "0.2", "--report", "page.txt"], "name an .html file"),
        (["nano-s", "--channels", "0.2", "--no-uniform", "--out", "smaller"], "Give --zeros"),
        (["no-such-model", "--channels", "0.2", "--recover", "nano"], "give --out"),
        (["nano-s", "--channels", "0.2", "--no-uniform", "--out", "smaller"], "Give --zeros"),
        (["no-such-model", "--channels", "0.2", "--set", "max_steps=3"], "give data to train on"),
        (
            ["nano-s", "--channels", "0.2", "--recover", "nano", "--out", "x", "--set", "a=1"],
            "TrainingArguments has none",
        ),
        (["nano-s", "--channels", "0.2", "--no-uniform", "--out", "smaller"], "Give --zeros"),
        (["no-such-model", "--channels", "0.2", "--score", "entropy"], "prune heads alone"),
        (["no-such-model", "--budget", "0.2", "--score", "entropy"], "prune heads alone"),
        (["nano-s", "--channels", "0.2", "--no-uniform", "--out", "smaller"], "Give --zeros"),
        (["no-such-model", "--channels", "1.5"], "channels = 1.5"),
        (["no-such-model", "--budget", "0.2", "--score", "best"], "'best' is not one of 'error'"),
        (["nano-s", "--heads", "0.1", *SMALL], "heads = 0.1: of 3"),
        (["my-model", "--budget", "0.2"], "calibration text is needed: --data"),
        (["nano-s", "--budget", "0.2", "--tokens", "64"], "--tokens 64 is one batch"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(["prune", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_a_model_without_a_smaller_form_or_sense_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load("nano-s")
    for name in ("quantised", "damaged"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        if name == "quantised":
            file = tmp_path / name / "config.json"
            how = {"quant_method": "bitsandbytes", "load_in_8bit": True}
            file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": how}))
            model.model.layers[0].mlp.down_proj.weight.data[0, 0] = torch.nan
    for name, words in (("quantised", "is quantised"), ("damaged", "perplexity is nan")):
        place, out = str(tmp_path / name), tmp_path / "out"
        assert outcome(["prune", place, "--channels", "0.2", "--data", "nano", *SMALL]) == 2
        assert words in capsys.readouterr().err
        assert outcome(["recover", place, "--data", "nano", "--rows", "40", "--out", str(out)]) == 2
        assert name in capsys.readouterr().err and not (out / "config.json").exists()


def test_a_folder_in_use_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    assert outcome(["prune", "no-such-model", "--budget", "0.2", "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "FILE/child"], "cannot be written"),
        (["--adapters", "FILE/child"], "cannot be written"),
        (["--report", "FILE/page.html"], "cannot be written"),
        (["--out", "OUT", "--adapters", "OUT"], "a place of its own"),
        (["--out", "OUT", "--adapters", "OUT/inside"], "a place of its own"),
        (["--out", "OUT", "--adapters", "OUT-pruned", "--recover", "nano"], "a place of its own"),
        (["--out", "OUT", "--report", "OUT/p.html", "--recover", "nano"], "a place of its own"),
        (["--out", "USED", "--recover", "nano"], "USED-pruned exists already"),
        (["--out", "/", "--recover", "nano"], "/ exists already"),
        (["--out", "OUT", "--recover", "EMPTY.txt"], "the text is empty"),
        (["--out", "OUT", "--recover", "SHORT.txt"], "a single piece"),
        (["--out", "OUT", "--recover", "nano", "--set", "lerning_rate=1"], "lerning_rate"),
        (["--report", "new/page.html", "--dtype", "banana"], "banana"),
    ],
)
def test_what_cannot_end_well_is_refused_before_the_work(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    Path("EMPTY.txt").touch()
    Path("SHORT.txt").write_text("a word")
    Path("USED-pruned").mkdir()
    Path("USED-pruned/thesis.tex").touch()
    before = sorted(tmp_path.rglob("*"))
    assert outcome(["prune", "nano-s", "--channels", "0.2", *SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1  # no progress before it: no work was done
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupted_export_goes_on_from_the_saved_pruning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pliant.structure.exporting.export as exporting

    command = ["prune", "nano-s", "--channels", "0.25", "--no-controls", *SMALL, "--json"]
    whole = tmp_path / "whole"
    assert outcome([*command, "--out", str(whole)]) == 0
    expected = json.loads(capsys.readouterr().out)
    places = ["--adapters", str(tmp_path / "pruned"), "--out", str(tmp_path / "smaller")]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(exporting, "save", stop)
        assert outcome([*command, *places]) == 130
    assert (tmp_path / "pruned").is_dir() and not (tmp_path / "smaller").exists()
    capsys.readouterr()
    other = ["prune", "nano-s", "--channels", "0.5", "--no-controls", *SMALL, *places]
    assert outcome(other) == 2 and "name a new folder" in capsys.readouterr().err
    assert outcome([*command, *places]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["plan"] == expected["plan"] and again["removed"] == expected["removed"]
    first, second = (
        AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (whole, tmp_path / "smaller")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert outcome([*command, *places]) == 2  # all is done


def test_edited_notes_are_no_pruning_to_go_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pruned"
    options = PruneOptions(model="nano-s", heads=0.34, controls=False, tokens=600, adapters=folder)
    command = ["prune", "nano-s", "--heads", "0.34", "--no-controls", "--tokens", "600"]
    command += ["--adapters", str(folder)]
    assert outcome(command) == 0
    path = folder / "notes.json"
    notes = json.loads(path.read_text())
    assert plan_of(folder, asdict(options)) is not None
    plan, (first, *rest) = notes["plan"], notes["plan"]["points"]
    points = [{"saved": float("nan")}, {"perplexity": "x"}, {"removed": "x"}, {"config": 7}]
    plans = [{"whole": 0.0}, {"whole": None}, {"of": 0.5}, {"points": []}]
    plans += [{"points": [{**first, **change}, *rest]} for change in points]
    edited: list[Any] = [7, [], {**notes, "command": "x"}, {**notes, "command": [1]}]
    edited += [{**notes, "plan": {**plan, **change}} for change in plans]
    for content in (json.dumps(each) for each in edited):
        path.write_text(content)
        assert plan_of(folder, asdict(options)) is None, content
    path.write_text("[" * 100_000)
    capsys.readouterr()
    assert outcome([*command, "--out", str(tmp_path / "out")]) == 2
    assert "name a new folder" in capsys.readouterr().err


def test_an_interrupted_recovery_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["max_steps=8", "logging_steps=1", "save_steps=4", "use_cpu=true"]
    command = ["prune", "nano-s", "--channels", "0.2", "--out", "out", "--recover", "nano"]
    command += ["--no-controls", *SMALL, *(word for s in settings for word in ("--set", s))]
    with Program("pliant", *command, cwd=tmp_path) as running:
        next(line for line in running.stderr if line.startswith("training, step 2 of"))
        running.send_signal(signal.SIGINT)
        rest, printed = running.stderr.read(), running.stdout.read()
        assert running.wait(timeout=60) == 130, rest
    assert "perplexity" in printed  # what was measured before is not lost
    way = rest.strip().partition("go on with: pliant ")[2]
    assert outcome(shlex.split(way)) == 0
    assert AutoModelForCausalLM.from_pretrained("out").config.num_hidden_layers == 3


def test_the_page_shows_what_was_lost_and_gained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "smaller", tmp_path / "page.html"
    command = ["prune", "nano-s", "--channels", "0.3", "--out", str(out), "--report", str(page)]
    assert outcome([*command, *SMALL]) == 0
    html = page.read_text()
    for words in ("Quality against what is saved", "Sizes and speeds", "operations of a prompt"):
        assert words in html
    assert html.count('class="verdict') == 1 and html.count("<dt>") == 4
    assert html.count("<figure>") == 4  # the curve, importance, gates, utilisation of heads
    assert "the whole model" in html and "Of 9 heads, 9 active" in html
    printed = capsys.readouterr()
    assert str(page) in printed.out and "Traceback" not in printed.err


def test_the_page_shows_closed_experts() -> None:
    """Their gates stay at 1, for the router no longer chooses them."""
    pruned = prune(tiny_model("mixtral"), text(), PruneConfig(experts=0.5))
    closed = [gates.count(0.0) for gates in gates_of(pruned)["experts"].values()]
    assert closed == [2, 2, 2, 2]


def test_the_smaller_model_is_recovered_in_the_same_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, adapters = tmp_path / "mine", tmp_path / "adapters"
    command = ["prune", "nano-s", "--channels", "0.5", "--out", str(out), "--no-controls", "--json"]
    training = ["--recover", "nano", "--set", "max_steps=3", "--adapters", str(adapters)]
    assert outcome([*command, *training, *SMALL]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["recovery"]["steps"] == 3
    assert report["recovery"]["before"] > report["recovery"]["teacher"]
    pruned, recovered = (AutoModelForCausalLM.from_pretrained(f"{out}{s}") for s in ("-pruned", ""))
    assert recovered.config.intermediate_size == pruned.config.intermediate_size
    weights = [m.model.layers[0].mlp.up_proj.weight for m in (pruned, recovered)]
    assert not torch.equal(*weights)
    again = tmp_path / "again"
    exported = ["export", "nano-s", "--adapters", str(adapters), "--out", str(again)]
    assert outcome(exported) == 0
    whole = AutoModelForCausalLM.from_pretrained(again)
    assert torch.equal(whole.model.layers[0].mlp.up_proj.weight, weights[0])


def test_a_smaller_cache_is_planned_from_heads_and_layers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["prune", "nano-s", "--budget", "0.3", "--budget-of", "kv", "--json"]
    assert outcome([*command, "--no-controls", *SMALL]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["of"] == "kv" and not plan["config"]["channels"]
    assert plan["config"]["heads"] or plan["config"]["layers"]


def test_the_smaller_model_still_answers(tmp_path: Path) -> None:
    out = tmp_path / "smaller"
    assert outcome(["prune", "nano-s", "--channels", "0.1", "--out", str(out), *SMALL]) == 0
    model, tokenizer = load(out)
    ids = tokenizer("what is 1+1?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > ids.shape[1]
