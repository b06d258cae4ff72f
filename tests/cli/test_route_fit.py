"""pliant route fit, evaluate and calibrate: from labels to a measured router."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.in_process import pliant
from tests.routing.labels import outcomes, specialists

from pliant import recipes
from pliant.cli import app
from pliant.routing.fitting.fit import kinds
from pliant.routing.fitting.ladder import EVERY
from pliant.routing.scorers import KINDS, READS_A_MODEL, READS_AN_ENCODER

RECIPES = Path(__file__).parents[2] / "recipes"


def route(*arguments, cwd):
    return pliant("route", *map(str, arguments), cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("route")
    outcomes(500, 1).write(folder / "labels.jsonl")
    outcomes(300, 2).write(folder / "test.jsonl")
    return folder


@pytest.fixture(scope="module")
def done(folder):
    return route(
        "fit", "--labels", "labels.jsonl", "--out", "router", "--scorer", "text", "--scorer",
        "length", "--goal", "40 % of calls", "--backend", "model-0=nano-s", "--backend",
        "model-1=nano-l", cwd=folder,
    )  # fmt: skip


def test_fit_shows_the_ladder_and_what_is_selected(done, folder):
    assert done.returncode == 0, done.stderr
    assert "The scorers" in done.stdout and "Selected: text" in done.stdout
    assert heading(done) == "APGR"
    assert "40 % of calls" in done.stdout
    first = done.stdout.splitlines()[0]
    assert first.startswith("Saves ") and "of model-1's cost at" in first
    assert "The labels cost 500 calls: earned back after" in done.stdout
    assert (folder / "router" / "router.json").is_file()


def test_the_ladder_has_every_scorer_and_the_bound_of_all(folder):
    outcomes(220, 1).write(folder / "few.jsonl")
    done = route("fit", "--labels", "few.jsonl", "--out", "all", "--ladder", cwd=folder)
    assert done.returncode == 0, done.stderr
    table = done.stdout.split("Selected:")[0]
    rungs = {line.split("  ")[0] for line in table.splitlines()}
    # A stack is made only of scorers that improve on each other.
    expected = {*KINDS} - {"oracle", "stack", *READS_A_MODEL, *READS_AN_ENCODER}
    assert expected <= rungs and "perfect routing" in rungs
    assert "probe, cpx" in done.stdout and "--base" in done.stdout
    assert "embed, text+embed" in done.stdout and "--encoder" in done.stdout


def test_a_scorer_that_needs_a_model_an_encoder_or_groups_is_not_tried_without():
    labels = outcomes(220, 1)
    reads = {*READS_A_MODEL, *READS_AN_ENCODER}
    assert set(EVERY) - set(kinds(None, None, labels, every=True)) == reads
    assert set(EVERY) == set(kinds(None, "nano-s", labels, every=True, encoder="minilm"))
    bare = replace(labels, groups=None)
    bare = kinds(None, "nano-s", bare, every=True, encoder="minilm")
    assert set(EVERY) - set(bare) == {"group", "text+group"}


def test_evaluate_and_calibrate(done, folder):
    shown = route("evaluate", "--router", "router", "--labels", "test.jsonl", cwd=folder)
    assert shown.returncode == 0, shown.stderr
    assert "APGR" in shown.stdout and "length" in shown.stdout
    assert shown.stdout.startswith("Saves ")
    both = "both.jsonl"
    parts = [(folder / name).read_text() for name in ("labels.jsonl", "test.jsonl")]
    (folder / both).write_text("".join(parts))
    warned = route("evaluate", "--router", "router", "--labels", both, cwd=folder)
    assert "WARNING" in warned.stdout and "left out" in warned.stdout
    anew = route(
        "calibrate", "--router", "router", "--labels", "test.jsonl", "--goal", "10 % of calls",
        "--json", cwd=folder,
    )  # fmt: skip
    assert anew.returncode == 0, anew.stderr
    assert json.loads(anew.stdout)["threshold"]["shares"][1] <= 0.1
    words = ["calibrate", "--router", "router", "--labels", "test.jsonl", "--goal"]
    strict = "at most 0.01 % worse, with 99 % confidence"
    refused = route(*words, strict, cwd=folder)
    assert refused.returncode == 2 and "stays as it is" in refused.stderr
    for options in ((strict, "--force"), ("100 % of calls",)):  # a budget is set without it
        changed = route(*words, *options, cwd=folder)
        assert changed.returncode == 0 and "WARNING: the router saves nothing" in changed.stdout


def test_labels_may_hold_conversations_under_any_name(done, folder):
    """The prompt is what comes before the last answer, in every command that reads labels."""
    outcomes(300, 3).write(folder / "plain.jsonl")
    with (folder / "chats.jsonl").open("w") as file:
        for row in map(json.loads, (folder / "plain.jsonl").read_text().splitlines()):
            turns = [("user", row.pop("prompt")), ("assistant", "an answer")]
            row["chat"] = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps(row) + "\n")
    chats = ("chats.jsonl", "--messages-column", "chat", "--json")
    asked = ("--router", "router")
    plain = route("evaluate", *asked, "--labels", "plain.jsonl", "--json", cwd=folder)
    shown = route("evaluate", *asked, "--labels", *chats, cwd=folder)
    assert shown.returncode == 0 and shown.stdout == plain.stdout, shown.stderr
    new = ("--out", "chats", "--scorer", "length", "--goal", "40 % of calls", "--force")
    for words in (
        ("report", *asked, "--out", "page.html", "--labels"),
        ("calibrate", *asked, "--goal", "40 % of calls", "--prompts"),
        ("calibrate", *asked, "--goal", "40 % of calls", "--labels"),
        ("fit", *new, "--labels"),
    ):
        done = route(*words, *chats, cwd=folder)
        assert done.returncode == 0, done.stderr
    both = route("evaluate", *asked, "--labels", *chats, "--prompt-column", "chat", cwd=folder)
    assert both.returncode == 2 and "--prompt-column and --messages-column" in both.stderr


def test_prompts_alone_bring_their_groups_and_no_option_is_ignored(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    words = ["route", "fit", "--labels", "labels.jsonl", "--out", "by-group", "--scorer", "group"]
    assert app.outcome([*words, "--groups-known", "--goal", "40 % of calls"]) == 0
    (folder / "bare.jsonl").write_text("".join(f'{{"prompt": "say {i}"}}\n' for i in range(60)))
    again = ["route", "calibrate", "--router", "by-group", "--goal", "30 % of calls", "--prompts"]
    capsys.readouterr()
    for options, words in (
        (["bare.jsonl"], "needs the group of each prompt"),
        (["test.jsonl", "--calibration", "isotonic"], "--calibration isotonic: needs --labels"),
        (["test.jsonl", "--unit", "usd"], "--unit usd: prompts alone have no costs"),
        (["test.jsonl", "--force"], "--force: needs --labels"),
    ):
        assert app.outcome([*again, *options]) == 2
        assert words in capsys.readouterr().err
    assert app.outcome([*again, "test.jsonl"]) == 0
    assert "everything" not in capsys.readouterr().out


def test_score_and_ask_say_the_same_of_a_prompt(done, folder):
    prompt = "times 12 and 15"
    asked = route("ask", "--router", "router", "--choose", "--json", prompt, cwd=folder)
    said = pliant("score", "router", prompt, "--json", cwd=folder)
    one, other = json.loads(asked.stdout), json.loads(said.stdout)
    assert one["score"] == pytest.approx(other["score"])
    assert one["gain"] == pytest.approx(other["gain"])


def test_questions_in_several_wordings_are_told_by_a_column(folder):
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["of"] = i // 2
    (folder / "twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = route(
        "fit", "--labels", "twice.jsonl", "--out", "twice", "--scorer", "length",
        "--question-column", "of", "--backend", "model-0=nano-s", "--backend", "model-1=nano-l",
        "--json", cwd=folder,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    said = json.loads(found.stdout)
    assert "three repeats of 5-fold cross-validation" in said["choice"]
    assert said["splits"] == {"learn": 240, "test": 60}
    assert said["evaluation"]["paraphrases"]["questions"] == said["splits"]["test"] // 2


@pytest.mark.parametrize("recipe", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_has_options_that_its_command_has(recipe):
    read = recipes.read(recipe)
    assert recipes.bind(read, app.command_function(read.command))


def test_recipes_lead_from_labels_to_a_measured_router(tmp_path, capsys):
    """The two that follow labelling, as they are but for the scorer: a fast one does here."""
    shutil.copytree(RECIPES, tmp_path / "recipes")
    (tmp_path / "out").mkdir()
    outcomes(300, 1).write(tmp_path / "out" / "labels.jsonl")
    outcomes(100, 2).write(tmp_path / "out" / "held-out.jsonl")
    steps = [["fit.yaml", "--set", "scorer=[tfidf]"], ["evaluate.yaml"]]
    for name, *changes in steps:
        assert app.outcome(["run", str(tmp_path / "recipes" / "routing" / name), *changes]) == 0
    assert "100 prompts. model-0 alone" in capsys.readouterr().out


def test_a_router_that_saves_nothing_is_shown_and_not_written(folder):
    """The length tells nothing here; the figures are shown, in JSON, too."""
    outcomes(300, 1).write(folder / "fewer.jsonl")
    words = ["fit", "--labels", "fewer.jsonl", "--out", "useless", "--scorer", "length"]
    done = route(*words, cwd=folder)
    assert done.returncode == 2 and not (folder / "useless").exists()
    assert done.stdout.startswith("Saves nothing: ") and "The scorers" in done.stdout
    assert "not written" in done.stderr and "--force" in done.stderr
    shown = json.loads(route(*words, "--json", cwd=folder).stdout)
    assert shown["written"] is False and shown["verdict"]["pays"] is False
    forced = route(*words, "--force", cwd=folder)
    assert forced.returncode == 0 and forced.stdout.startswith("Saves nothing: ")
    assert (folder / "useless" / "router.json").is_file()


def test_why_a_scorer_was_selected_is_said_of_those_that_can_be(folder):
    """Of specialists chance decides which is ahead."""
    prices = np.tile([1.0, 2.0], (300, 1))
    replace(specialists(300, 0), cost=prices).write(folder / "specialists.jsonl")
    words = ["--scorer", "length", "--scorer", "group", "--scorer", "random", "--force"]
    done = route("fit", "--labels", "specialists.jsonl", "--out", "why", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Selected: length, the only one tried that can be." in done.stdout
    assert "group is better, but needs --groups-known." in done.stdout
    assert heading(done) == "APGR" and "nan" not in done.stdout


def test_of_three_models_the_scorers_are_compared_by_aiq(folder):
    outcomes(220, 1, models=3).write(folder / "three.jsonl")
    words = ["--scorer", "text", "--scorer", "length", "--force"]
    for i, backend in enumerate(("nano-s", "nano-l", "nano-s")):
        words += ["--backend", f"model-{i}={backend}"]
    done = route("fit", "--labels", "three.jsonl", "--out", "three", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert heading(done) == "AIQ" and "APGR" not in done.stdout
    assert "Selected: text, the preferred one" in done.stdout


def heading(done):
    """The metric that the table of the scorers is ordered by."""
    return next(line for line in done.stdout.splitlines() if line.startswith("scorer ")).split()[1]


def test_at_one_price_right_answers_are_counted_and_not_savings(folder):
    specialists(400, 3).write(folder / "one-price.jsonl")
    words = ["--scorer", "tfidf", "--scorer", "group", "--backend", "model-0=nano-s"]
    words += ["--backend", "model-1=nano-l"]
    done = route("fit", "--labels", "one-price.jsonl", "--out", "one-price", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith("Answers ") and "more prompts right than always asking model-" in first
    assert "at the same cost" in first and "save" not in done.stdout.lower()
    assert "% of calls to model-0" in done.stdout and "% of calls to model-1" in done.stdout
    assert "lift 0." in done.stdout and "earned back" not in done.stdout
    assert "which knows the group of every prompt" in done.stdout
    assert heading(done) == "AIQ"


def test_prompts_that_not_every_model_was_asked_are_left_out_of_an_evaluation(folder, done):
    table = outcomes(300, 4)
    right = table.right.copy()
    right[:100, 1] = np.nan
    replace(table, right=right).write(folder / "partial.jsonl")
    words = ["--router", "router", "--labels", "partial.jsonl"]
    shown = route("evaluate", *words, cwd=folder)
    assert shown.returncode == 0, shown.stderr
    assert "WARNING: not every model was asked 100 of these prompts" in shown.stdout
    assert "200 prompts. model-0 alone" in shown.stdout and "nan" not in shown.stdout


def test_models_with_nothing_between_them_are_said(folder):
    labels = replace(outcomes(300, 1), right=np.ones((300, 2)))
    labels.write(folder / "equal.jsonl")
    done = route(
        "fit", "--labels", "equal.jsonl", "--out", "equal", "--scorer", "length", cwd=folder
    )
    assert done.returncode == 2 and "nothing to gain from routing: model-0" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scorer", "cpx"], "--base"),
        (["--goal", "faster"], "no goal"),
        (["--goal", "30 % of calls", "--lam", "1"], "give one of them"),
        (["--backend", "model-0"], "MODEL=BACKEND"),
        (["--goal", ""], "no goal"),
        (["--lam", "inf"], "lam"),
        (["--seed", "-1"], "--seed"),
        (["--question-column", "qestion"], "no column 'qestion'"),
        (["--prompt-column", "promt"], "did you mean 'prompt'"),
        (["--right-column", "rights"], "--right-column"),
        (["--goal", "5 ms a call"], "are in calls, not ms"),
        (["--calibration", "plat"], "'platt', 'temperature', 'isotonic'"),
        (["--unit", "dollars"], "'tokens', 'usd', 'ms', 'flops', 'calls'"),
        (["--backend", "model-0=./nowhere"], "no such folder"),
    ],
)
def test_what_is_wrong_is_one_line(folder, arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    fit = ["route", "fit", "--labels", "labels.jsonl", "--out", "other"]
    assert app.outcome([*fit, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and not (folder / "other").exists()
