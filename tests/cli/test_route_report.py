"""`pliant route report`: one page that holds what was measured, and what it says without labels."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tests.routing.labels import specialists
from tests.routing.live.test_grades import answered
from tests.routing.minimal_scorer import content

from pliant.cli import app
from pliant.cli.route import report_page, tables
from pliant.cli.route.report_data import Measured, ReportData, fit_record
from pliant.routing import Outcomes, router_file, scorers
from pliant.routing.fitting.calibrating import calibrate
from pliant.routing.fitting.evaluate import evaluate
from pliant.routing.fitting.fit import fit
from pliant.routing.fitting.splits import add_hashes
from pliant.routing.router import Router
from pliant.routing.router_file import make
from pliant.routing.scorers.novelty import WithNovelty

GOAL = "40 % of calls"


def world(n: int, seed: int, models: int = 2) -> Outcomes:
    """Long prompts are hard for the cheap model; half of them say so in a word."""
    rng = np.random.default_rng(seed)
    hard = rng.integers(0, 2, n)
    prompts = [
        f"{'prove ' * h}<b>[{seed}.{i}] {' '.join(rng.choice(['sum', 'list'], 3 + 9 * h))}"
        for i, h in enumerate(hard.tolist())
    ]
    easy = np.linspace(0.2, 0.9, models)
    chance = np.where(hard[:, None] > 0, easy, 0.95)
    right = (rng.random((n, models)) < chance).astype(float)
    cost = np.tile(np.linspace(1, 5, models), (n, 1))
    groups = tuple("ab"[int(x)] for x in rng.random(n) < 0.3)
    names = ("small", "middle", "large")
    chosen = names[:1] + names[3 - models + 1 :]
    return Outcomes(tuple(prompts), chosen, right, cost, groups, unit="calls")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    # Backends that nobody asks: to choose is not to ask.
    backends = {name: f"{name}=openai:m@http://127.0.0.1:9/v1" for name in ("small", "large")}
    kinds = ["length", "random", "tfidf"]
    fit(world(600, 0), folder / "router", scorers=kinds, goal=GOAL, backends=backends)
    world(300, 1).write(folder / "test.jsonl")
    return folder


@pytest.fixture
def router(fitted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fitted / "router", tmp_path / "router"))


def report(router: Path, out: Path, *words: str) -> int:
    return app.outcome(["route", "report", "--router", str(router), "--out", str(out), *words])


def headings(page: Path) -> list[str]:
    return re.findall("<h2[^>]*>(.*?)</h2>", page.read_text())


FIGURES = ("quality", "cost", "escalated", "overhead")


def test_one_page_holds_all_of_it_and_fetches_nothing(
    router: Path, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "report.html"
    assert report(router, out, "--labels", str(fitted / "test.jsonl")) == 0
    assert headings(out) == [
        "Quality against cost",
        "Figures, and what they are worth",
        "Groups",
        "On both sides of the threshold",
        "Probabilities",
        "Scores",
        "How the scorer was chosen",
        "What the labels cost",
        "The ledger",
    ]
    html = out.read_text()
    assert html.count("<svg") == 5
    assert [html.count(f"<dt>{name}</dt>") for name in FIGURES] == [1, 1, 1, 1]
    assert html.index('class="verdict') < html.index('class="figures"') < html.index("<h2")
    assert "src=" not in html and "href=" not in html.replace('href="#', "")
    assert "&lt;b&gt;[1." in html and "<b>[1." not in html
    for said in ("chosen:", GOAL, "perfect", "random", "length", "this router", "small wrong"):
        assert said in html, said
    printed = capsys.readouterr().out
    for title in ("Metrics", "Probabilities", "Group by group", "Labels by model"):
        assert title in printed
    assert printed.endswith(f"Page: {out.resolve()}\n")
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_its_figures_are_those_of_evaluate_and_its_groups_add_up(
    router: Path, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = fitted / "test.jsonl"
    assert report(router, tmp_path / "x.html", "--labels", str(labels), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    measured, expected = said["measured"], evaluate(router, Outcomes.read(labels)).as_dict()
    assert {name: measured[name] for name in expected} == json.loads(json.dumps(expected))
    n = sum(group["n"] for group in measured["groups"])
    assert n == 300 and [group["name"] for group in measured["groups"]] == ["a", "b"]
    for name, whole in (
        ("share", expected["routed"]["shares"]["large"]),
        ("routed", expected["routed"]["quality"]["value"]),
        ("weak", expected["weak_quality"]),
        ("strong", expected["strong_quality"]),
    ):
        total = sum(group["n"] * group[name] for group in measured["groups"]) / n
        assert total == pytest.approx(whole), name
    lost = sum(group["n"] * group["lost"]["value"] for group in measured["groups"]) / n
    assert lost == pytest.approx(
        expected["strong_quality"] - expected["routed"]["quality"]["value"]
    )
    page = (tmp_path / "x.html").read_text()
    worst = max(measured["groups"], key=lambda group: group["lost"]["value"])["name"]
    assert re.search(r"the most damaged first.*?<tbody><tr><td[^>]*>(.)<", page, re.S)[1] == worst
    # 600 labels, each asked of a model for 1 and of one for 5.
    saved = 5 - expected["routed"]["cost"]["value"]
    assert said["label_cost"] == 3600
    assert said["paid_back"] == pytest.approx(3600 / saved)
    assert measured["perfect"]["quality"][50] >= measured["curve"]["quality"][50]


def test_each_prompt_is_scored_once(
    router: Path, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    predict = WithNovelty.predict

    def counted(self: WithNovelty, prompts: Any, groups: Any = None) -> Any:
        asked.append(len(prompts))
        return predict(self, prompts, groups)

    monkeypatch.setattr(WithNovelty, "predict", counted)
    assert report(router, tmp_path / "x.html", "--labels", str(fitted / "test.jsonl")) == 0
    assert asked == [300]


def test_what_scoring_costs_is_counted_once(router: Path, fitted: Path) -> None:
    file = router_file.read(router)
    dear = file.model_copy(update={"scorer": file.scorer.model_copy(update={"cost": 0.5})})
    dear.write(router)
    evaluation = evaluate(router, Outcomes.read(fitted / "test.jsonl"))
    found = ReportData(router, dear, Measured(evaluation, "test.jsonl"), (), None)
    routed = evaluation.routed.cost.value  # scoring is in it
    assert "costs 0.5 calls, which is counted in that" in report_page.summary(found)[-3]
    assert found.paid_back == pytest.approx(3600 / (5 - routed))


def test_without_labels_it_shows_what_the_fit_measured(router: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert report(router, out) == 0
    assert "the 90 labels that the fit held out" in out.read_text()
    assert "Probabilities" in headings(out)


def test_a_threshold_that_was_set_anew_is_not_drawn_where_the_old_one_was(
    router: Path, fitted: Path, tmp_path: Path
) -> None:
    calibrate(router, world(300, 2), "30 % of calls")
    out = tmp_path / "report.html"
    assert report(router, out) == 0
    html = out.read_text()
    assert "has changed since this was measured" in html and "chosen:" not in html
    assert not {"Probabilities", "On both sides of the threshold"} & set(headings(out))
    assert report(router, out, "--labels", str(fitted / "test.jsonl")) == 0
    assert "chosen:" in out.read_text() and "30 % of calls</" in out.read_text()


def test_where_nothing_was_measured_it_says_what_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    length = scorers.make("length").fit(world(50, 3), None, 0)
    Router(make(**content(scorer={"kind": "length"})), length).save(tmp_path / "router")
    out = tmp_path / "report.html"
    assert report(tmp_path / "router", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["measured"] is None
    assert report(tmp_path / "router", out) == 0
    assert "--labels test.jsonl" in out.read_text()
    assert report_page.MEASURE_IT in capsys.readouterr().out
    assert "<svg" not in out.read_text()


def test_the_ledger_is_added_up_and_can_be_left_out(
    router: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Router.load(router) as asked:
        for prompt in world(40, 4).prompts:
            asked.choose(prompt)
    assert report(router, tmp_path / "x.html", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ledger"]["decisions"] == 40
    assert report(router, tmp_path / "x.html") == 0
    assert "40 decisions: 0 answered, 0 failed, 40 only chose" in capsys.readouterr().out
    assert "Calls by model" in (tmp_path / "x.html").read_text()
    assert report(router, tmp_path / "x.html", "--ledger", "none", "--json") == 0
    assert json.loads(capsys.readouterr().out)["ledger"] is None


def test_what_exploring_cost_is_stated(
    router: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Router.load(router) as asked:
        row = answered(asked.ledger, "what?", "large", cost=5.0)
        answers = {"large": ("4", 5.0), "small": ("5", 1.0)}
        asked.ledger.grades.explored(row, "what?", None, answers, [])
    assert report(router, tmp_path / "x.html") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "They cost 6 calls" in printed
    assert "1 novel prompts were explored: the other models' 1 answers cost 1 call of" in printed


def test_with_three_models_the_line_uses_all_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "router"
    fit(world(400, 5, models=3), folder, scorers=["length"], goal="at most 3 calls per prompt")
    labels = world(300, 6, models=3)
    found = evaluate(folder, labels)
    assert found.by_price is not None and found.perfect is not None
    assert list(found.by_price.cost) == sorted(found.by_price.cost)
    assert max(found.perfect.quality) == pytest.approx(labels.right.max(axis=1).mean())
    shares = found.routed.shares
    assert sum(shares.values()) == pytest.approx(1) and len(shares) == 3
    labels.write(tmp_path / "labels.jsonl")
    assert report(folder, tmp_path / "x.html", "--labels", str(tmp_path / "labels.jsonl")) == 0
    assert "use all models" in (tmp_path / "x.html").read_text()


def test_at_one_price_the_page_counts_right_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = specialists(600, 0)
    folder, page = tmp_path / "router", tmp_path / "x.html"
    fit(labels.select(range(400)), folder, scorers=["tfidf", "group"], force=True)
    labels.select(range(400, 600)).write(tmp_path / "labels.jsonl")
    assert report(folder, page, "--labels", str(tmp_path / "labels.jsonl")) == 0
    text, printed = page.read_text(), capsys.readouterr().out
    for shown in (text, printed):
        assert "points more prompts right than always asking model-" in shown
        assert "best model of each group" in shown and "every model costs the same" in shown
        assert "paid back in right answers" in shown
    for wrong in ("escalated", "never earned back", "as the price of cost goes up", "Stay with"):
        assert wrong not in text, wrong
    assert "more right" in text and "perfect routing" in text


def test_an_evaluation_from_json_gives_the_same_page(
    router: Path, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = str(fitted / "test.jsonl")
    pages = tmp_path / "labels.html", tmp_path / "evaluation.html"
    assert report(router, pages[0], "--labels", labels) == 0
    capsys.readouterr()
    words = ["route", "evaluate", "--router", str(router), "--labels", labels, "--json"]
    assert app.outcome(words) == 0
    evaluation = tmp_path / "test.jsonl"
    evaluation.write_text(capsys.readouterr().out)
    assert report(router, pages[1], "--evaluation", str(evaluation)) == 0
    first, second = (page.read_text().replace("the 300 prompts", "300 prompts") for page in pages)
    assert second == first
    capsys.readouterr()
    assert report(router, pages[1], "--evaluation", str(evaluation), "--labels", labels) == 2
    assert "one of the two" in capsys.readouterr().err
    calibrate(router, world(300, 2), "30 % of calls")
    assert report(router, pages[1], "--evaluation", str(evaluation)) == 0
    assert "has changed since this was measured" in pages[1].read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--evaluation", "nowhere.json"], "no such file"),
        (
            ["--evaluation", "{router}/router.json"],
            "`pliant route evaluate --json` prints",
        ),
        (["--labels", "nowhere.jsonl"], "no such file"),
        (["--ledger", "nowhere.sqlite"], "--ledger none"),
        (["--ledger", "{router}/router.json"], "not a ledger"),
        (["--labels", "{flops}"], "in flops, the router's in calls"),
        (["--labels", "{known}"], "fitted on all"),
    ],
)
def test_bad_input_is_one_line_and_leaves_the_old_page(
    words: list[str],
    said: str,
    router: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replace(world(20, 7), unit="flops").write(tmp_path / "flops.jsonl")
    known = world(2, 9)
    known.write(tmp_path / "known.jsonl")
    add_hashes(router_file.read(router).fit_folder(router), known.prompts)
    places = {name: tmp_path / f"{name}.jsonl" for name in ("flops", "known")}
    given = [word.format(router=router, **places) for word in words]
    out = tmp_path / "report.html"
    out.write_text("<!doctype html>old")
    assert report(router, out, *given) == 2
    printed, complained = capsys.readouterr()
    assert printed == "" and complained.count("\n") == 1 and said in complained
    assert out.read_text() == "<!doctype html>old"


def test_a_page_that_cannot_be_written_is_said(
    router: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(router, tmp_path) == 2
    assert "a folder; name the page" in capsys.readouterr().err
    assert report(tmp_path / "no-router", tmp_path / "x.html") == 2
    assert "holds no router.json" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"evaluation": {}}'])
def test_a_damaged_record_of_the_fit_is_named(
    damage: str, router: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (router_file.read(router).fit_folder(router) / "fit.json").write_text(damage)
    assert report(router, tmp_path / "x.html") == 2
    complained = capsys.readouterr().err
    assert "fit.json: not what Pliant writes" in complained and complained.count("\n") == 1
    assert not (tmp_path / "x.html").exists()


def test_every_table_that_is_printed_fits_eighty_columns(router: Path, fitted: Path) -> None:
    file = router_file.read(router)
    measured = Measured(evaluate(router, Outcomes.read(fitted / "test.jsonl")), "test.jsonl")
    found = ReportData(router, file, measured, fit_record(router, file)[1], None)
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    printed = [
        tables.points(found, measured),
        tables.metrics(measured.evaluation),
        tables.baselines(measured.evaluation, narrow=True),
        tables.probabilities(measured.evaluation),
        tables.groups(found, measured),
        tables.labels(found),
        tables.ladder(found.ladder, found.file.names, found.file.scorer.kind),
    ]
    for table in printed:
        table.draw(console)
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "…" not in out.getvalue()  # rich cuts what has no room


def test_what_is_not_defined_is_a_dash(router: Path, fitted: Path) -> None:
    """The strong model is no better here, so that most metrics do not exist."""
    labels = world(60, 8)
    alike = Outcomes(
        labels.prompts, labels.models, labels.right[:, [0, 0]], labels.cost, unit="calls"
    )
    file = router_file.read(router)
    measured = Measured(evaluate(router, alike), "labels")
    found = ReportData(router, file, measured, (), None)
    (apgr, *_) = tables.metrics(measured.evaluation).rows
    assert apgr[:3] == ["APGR", "-", ""]
    assert len(report_page.sections(found)) > 3
    assert not measured.evaluation.groups


@pytest.mark.parametrize(
    ("cost", "unit", "said"),
    [
        (0.00123, "usd", "$0.00123"),
        (2.6, "usd", "$2.60"),
        (5.6e7, "flops", "56 MFLOPs"),
        (3.14159, "ms", "3.14 ms"),
        (0.0, "calls", "0 calls"),
        (1.0, "calls", "1 call"),
        (-0.25, "usd", "-$0.25"),
        (999_700, "flops", "1 MFLOPs"),
        (61_000, "ms", "61 s"),
        (48_212, "tokens", "48.2k tokens"),
    ],
)
def test_a_cost_is_short_and_has_its_unit(cost: float, unit: str, said: str) -> None:
    assert tables.amount(cost, unit) == said
