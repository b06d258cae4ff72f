"""The demo: two real models, honest arithmetic, one page that needs no network."""

import json
import re
from dataclasses import replace

import pytest
from tests.in_process import pliant

from pliant import nano
from pliant.cli import app
from pliant.cli.demo import _print, real, size
from pliant.cli.demo.two_models import (
    Answer,
    Shown,
    TwoModels,
    _ask,
    difficulty_table,
    section,
)
from pliant.reports.page import Section
from pliant.reports.tables import Table


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """With a third of the questions to learn from, which is enough for what is tested."""
    folder = tmp_path_factory.mktemp("demo")
    words = ["demo", "--questions", "100", "--steps", "3", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(size, "SHORT", replace(size.SHORT, trained=1_000, race_points=2))
        return pliant(*words, cwd=folder), folder


def test_it_asks_both_models_and_counts_what_they_cost(demo):
    done, _ = demo
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["two_models"]
    assert found["questions"] == 100
    assert found["mean_flops"]["nano-l"] > 3 * found["mean_flops"]["nano-s"] > 1e5
    for shown in found["shown"]:
        for answer in shown["answers"].values():
            assert answer["right"] == (answer["text"].strip() == shown["question"]["answer"])
            assert answer["flops"] > 0 and answer["milliseconds"] > 0
    best = max(found["accuracy"].values())
    assert found["perfect_routing"]["accuracy"] >= best


def test_the_page_opens_without_a_network_and_shows_the_same(demo):
    done, folder = demo
    page = (folder / "pliant-demo.html").read_text()
    assert json.loads(done.stdout)["page"] == str((folder / "pliant-demo.html").resolve())
    # No address is fetched: what stands in href and src, if anything, lies in the page itself.
    addresses = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert all(address.startswith(("#", "data:image/png;")) for address in addresses)
    assert "@import" not in page and "<script" not in page
    # Three steps of a race tell nothing, so it has neither a picture nor a figure.
    assert page.count("<svg") == 5 and "selected tokens gain" not in page
    accuracy = json.loads(done.stdout)["two_models"]["accuracy"]
    assert f"{accuracy['nano-s']:.2f}" in page and f"{accuracy['nano-l']:.2f}" in page


def test_the_smaller_model_answers_too(demo):
    done, _ = demo
    found = json.loads(done.stdout)
    smaller = found["smaller"]
    assert 0.75 < smaller["parameters"]["smaller"] / smaller["parameters"]["whole"] < 0.9
    perplexities = smaller["perplexities"]
    assert perplexities["compensated"] < perplexities["random"]
    assert smaller["accuracies"]["whole"] == found["two_models"]["accuracy"]["nano-l"]
    assert smaller["accuracies"]["smaller"] > found["two_models"]["accuracy"]["nano-s"]
    assert smaller["difference"] < 1e-5
    assert len(smaller["answers"]) == len(found["two_models"]["shown"])


def test_the_router_answers_for_both_and_says_what_it_saved(demo):
    done, _ = demo
    found = json.loads(done.stdout)
    routed, accuracy = found["router"], found["two_models"]["accuracy"]
    assert {turn["model"] for turn in routed["turns"]} <= set(nano.NAMES)
    assert (
        accuracy["nano-s"]
        < routed["accuracy"]
        <= found["two_models"]["perfect_routing"]["accuracy"]
    )
    small = (
        found["two_models"]["mean_flops"]["nano-s"] / found["two_models"]["mean_flops"]["nano-l"]
    )
    unscored = routed["share"] + (1 - routed["share"]) * small
    assert unscored < routed["cost"] < unscored + small  # a score is less than an answer
    assert routed["apgr"]["low"] > 0.5  # better than chance
    rival = routed["text"]  # scores for nothing
    assert rival["cost"] == pytest.approx(rival["share"] + (1 - rival["share"]) * small)
    ahead = routed["ahead_of_text_at_equal_cost"]
    assert -0.3 < ahead["low"] <= ahead["value"] <= ahead["high"] < 0.3
    turns = {turn["prompt"]: turn for turn in routed["turns"]}
    for shown in found["two_models"]["shown"]:
        turn = turns[shown["question"]["prompt"]]
        assert turn["right"] == shown["answers"][turn["model"]]["right"]
        assert 0 <= turn["score"] <= 1


def test_three_ways_of_training_are_raced_from_the_same_start(demo):
    done, folder = demo
    found = json.loads(done.stdout)["tokens"]
    names = [run["name"] for run in found["runs"]]
    assert found["seconds"] is None and found["runs"][2]["steps"] == 3  # no clock decides
    assert names[0] == "sampled .25, sparse" and names[2] == "standard"
    assert names[1].startswith("random sequences") and found["seeds"] == 3
    starts = {curve[0][1] for run in found["runs"] for curve in run["curves"]}
    assert len(starts) == 1  # all begin as the embedded model
    assert all(run["loss"] < starts.copy().pop() for run in found["runs"])  # and learn
    by_operations = {run["name"]: run["operations_a_step"] for run in found["runs"]}
    assert by_operations[names[0]] == pytest.approx(by_operations[names[1]], rel=0.2)
    page = (folder / "pliant-demo.html").read_text()
    assert page.count('class="coloured"') == 3 and 'class="marked"' in page


def test_it_says_at_once_how_long_it_takes(demo):
    done, _ = demo
    assert done.stderr.splitlines()[0].endswith("about a minute on two cores.")


def test_a_chapter_has_a_heading_and_blank_lines(capsys):
    _print(2, Section("Who?", ["one.", "two."], [Table("figures", ["n"], [["1"]])]))
    assert capsys.readouterr().out == "2. Who?\n=======\n\none.\n\ntwo.\n\nfigures\nn\n1\n\n"


def test_too_few_questions_and_a_folder_as_page_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert app.outcome(["demo", "--questions", "3"]) == 2
    assert "--questions is 3" in capsys.readouterr().err
    assert app.outcome(["demo", "--page", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written_is_said_before_any_model_is_asked(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert app.outcome(["demo", "--page", "file/page.html"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "file" in line


@pytest.mark.parametrize("name", nano.NAMES)
def test_the_cost_of_an_answer_is_that_of_its_products_and_its_attention(name):
    """Counted by hand: each matrix once a token, and each query with each key in each layer."""
    model, tokenizer = nano.load(name)
    (question,) = nano.questions("test", 1, seed=3, families=["find"])
    answer = _ask(model, tokenizer, question)
    prompt = len(question.prompt) + 2  # bytes, and one token a role
    said = len(answer.text) + 1  # and the end
    assert said < 24, "an answer that was cut off has no end"
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    products = 2 * matrices * (prompt + said - 1) + 2 * model.lm_head.weight.numel() * said
    config = model.config
    a_pair = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    pairs = prompt**2 + sum(prompt + i for i in range(1, said))
    # Some versions of transformers form the rotary angles by a product, too.
    angles = config.head_dim * (prompt + said - 1)
    assert answer.flops - products - a_pair * pairs in (0, angles)


def test_a_difficulty_that_was_not_asked_has_no_accuracy():
    two = found("11", "10")
    asked = {q.difficulty for q in two.questions}
    assert two.difficulties == sorted(asked) and len(asked) < 5
    assert len(difficulty_table(two).rows) == len(asked) + 1


def found(right_small: str, right_large: str) -> TwoModels:
    asked = tuple(nano.questions("test", len(right_small)))
    answer = {"nano-s": Answer("", False, 10, 1.0), "nano-l": Answer("", False, 50, 2.0)}
    return TwoModels(
        shown=(Shown(asked[0], answer),),
        questions=asked,
        right={
            "nano-s": tuple(c == "1" for c in right_small),
            "nano-l": tuple(c == "1" for c in right_large),
        },
        flops={"nano-s": 10.0, "nano-l": 50.0},
        parameters={"nano-s": 1, "nano-l": 5},
    )


def test_perfect_routing_asks_the_large_model_only_where_it_alone_is_right():
    two = found("1100", "1010")
    assert two.share("nano-s") == two.share("nano-l") == 0.5
    assert two.perfect() == 0.75
    assert two.needs_large() == 0.25
    assert two.perfect_cost() == pytest.approx((0.25 * 50 + 0.75 * 10) / 50)


def test_a_model_that_says_html_does_no_harm_to_the_page():
    from pliant.reports.page import render

    two = found("11", "11")
    shown = two.shown[0]
    hostile = {n: replace(a, text="<script>alert(1)</script>") for n, a in shown.answers.items()}
    page = render("t", [section(replace(two, shown=(replace(shown, answers=hostile),)))])
    assert "<script" not in page and "&lt;script" in page


# --- a real model ---------------------------------------------------------------------------------


def test_the_real_demo_runs_its_chapters(tmp_path, monkeypatch, capsys):
    """On an embedded model and few passages."""
    for name, value in {"MODEL": "nano-s", "TRAINING": 24, "TEST": 16, "NEW_TOKENS": 4}.items():
        monkeypatch.setattr(real, name, value)
    page = tmp_path / "real.html"
    arguments = ["demo", "--real", "--json", "--steps", "1", "--page", str(page)]
    assert app.outcome(arguments) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["score + generate"]["identical"] is True
    assert results["score + generate"]["answer"]
    assert results["difficulty"]["passages"] == [24, 16]
    for auroc in ("scorer", "prompt_loss"):
        assert 0 <= results["difficulty"][auroc] <= 1
    assert len(results["tokens"]["runs"]) == 2
    text = page.read_text()
    assert "the same tokens" in text and "Which passages will be hard" in text


def test_the_real_demo_says_how_to_fetch_its_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PLIANT_MODELS", str(tmp_path))
    page = tmp_path / "real.html"
    assert app.outcome(["demo", "--real", "--page", str(page)]) == 2
    assert "pliant models get smollm2-135m" in capsys.readouterr().err
    assert not page.exists()
