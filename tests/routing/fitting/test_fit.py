"""From labels to a router: the test split serves once, no file is half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.routing.labels import outcomes, specialists
from tests.routing.scorers.test_corrections import poems

from pliant.cli.route import tables
from pliant.cli.route.report_data import ReportData
from pliant.errors import InvalidInput
from pliant.routing import Router, router_file
from pliant.routing.backends import Used
from pliant.routing.fitting import ladder
from pliant.routing.fitting.calibrating import calibrate, choose_threshold
from pliant.routing.fitting.evaluate import calibrated, evaluate
from pliant.routing.fitting.fit import SavesNothing, fit, write
from pliant.routing.fitting.ladder import Rung
from pliant.routing.fitting.router_folder import refuse_folder
from pliant.routing.fitting.splits import OUT_OF_FOLD, fitted_on
from pliant.routing.goals.goal import Goal
from pliant.routing.goals.thresholds import Threshold, threshold
from pliant.routing.labels.label import JUDGE
from pliant.routing.live import drift
from pliant.routing.live.decision import Costing
from pliant.routing.live.ledger import Ledger
from pliant.routing.outcomes import Outcomes
from pliant.routing.scorers import Predictions, kind_class, make
from pliant.routing.scorers.linear import joined
from pliant.routing.units import amount
from pliant.stats import Band

CHEAP = ("random", "length", "text")
BACKENDS = {"model-0": "nano-s", "model-1": "nano-l"}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    out = tmp_path_factory.mktemp("routers") / "router"
    return fit(outcomes(1500, 1), out, scorers=CHEAP, backends=BACKENDS)


def test_each_question_twice_proves_no_more_than_once():
    once = outcomes(600, 4)
    twice = joined((once, once))
    asked = replace(twice, questions=tuple(str(i) for i in range(600)) * 2)
    gain = once.gain + np.random.default_rng(0).normal(0, 1, 600)
    goal = "at most 5 % worse, with 95 % confidence"
    shares = [
        threshold(goal, predictions, labels).share
        for predictions, labels in (
            (gain, once),
            (np.tile(gain, 2), asked),
            (np.tile(gain, 2), twice),
        )
    ]
    assert shares[0] == shares[1] > shares[2]


def rung(kind: str, gain: np.ndarray) -> Rung:
    return Rung(kind, make(kind), Predictions(None, gain), Band(0, 0, 1), 0.0, 0.0, 0)


def test_a_pair_with_nothing_to_gain_is_refused_before_the_work(tmp_path):
    labels = outcomes(300, 1)
    worse = np.stack([labels.right[:, 1], labels.right[:, 1] * labels.right[:, 0]], axis=1)
    for right in (np.ones((300, 2)), worse):
        with pytest.raises(InvalidInput, match="nothing to gain.*Always ask model-0"):
            fit(replace(labels, right=right), tmp_path / "r", scorers=["text"])
    assert not (tmp_path / "r").exists()


def test_the_strongest_model_is_the_one_that_the_labels_show(tmp_path):
    """With the costs the other way round, the expensive model is the bad one."""
    labels = outcomes(600, 1)
    dear = replace(labels, cost=labels.cost[:, ::-1])
    made = fit(dear, tmp_path / "r", scorers=["text"], force=True)
    assert made.file.names == ("model-0", "model-1") and made.file.default == "model-1"
    assert made.file.costs == (1.0, 0.0)
    report, routed = made.evaluation.report, made.evaluation.routed
    assert report.strong_quality > report.weak_quality
    assert np.isfinite(made.evaluation.metrics["apgr"].value)
    assert routed.share > 0.5 and "likelier right" in made.file.threshold.sentence
    goal = fit(
        replace(labels, cost=labels.cost[:, ::-1]), tmp_path / "g", scorers=["text"],
        goal="95 % of the large model's quality", force=True,
    )  # fmt: skip
    assert goal.threshold.quality >= goal.threshold.strong_quality, "calls to model-0 save nothing"


def test_three_models_are_ordered_by_the_labels_whatever_they_cost(tmp_path):
    """The most expensive is the worst, and the middle one the best: goals are measured by that."""
    labels = outcomes(900, 1, models=3)
    labels = replace(labels, cost=np.tile([1.0, 9.0, 3.0], (900, 1)))
    right = labels.right.copy()
    right[:, 1] = right[:, 0] * (np.arange(900) % 5 > 0)  # worse than the cheap one
    labels = replace(labels, right=right)
    made = fit(labels, tmp_path / "r", scorers=["text"], goal="95 % of the large model's quality")
    assert made.file.names == ("model-1", "model-0", "model-2") and made.file.default == "model-2"
    assert made.file.costs == (9.0, 1.0, 3.0)
    shares = made.evaluation.routed.shares
    assert shares["model-1"] == 0 and 0.1 < shares["model-2"] < 0.9
    assert made.threshold.quality >= 0.95 * made.threshold.strong_quality
    assert made.verdict.pays and made.verdict.strongest == "model-2"
    budget = choose_threshold(
        "2 calls a prompt", Predictions(None, made.selected.gain), made.splits.learn
    )
    assert budget.cost <= 2 and budget.shares[0] == 0
    proved = choose_threshold(
        "at most 0.2 % worse, with 99 % confidence",
        Predictions(None, made.selected.gain),
        made.splits.learn,
    )
    assert proved.value == -np.inf and proved.shares == (0, 0, 1)
    with Router.load(made.folder, ledger=None) as router:
        assert router.choose(" ").model == "model-0", "an empty prompt goes to the cheapest"
        assert router.choose("Wie spät ist es denn?").model == "model-2"


def test_scorers_are_compared_where_the_strongest_model_is_not_better_on_the_labels(tmp_path):
    """Specialists of about equal quality: chance decides which is ahead on a split."""
    labels = specialists(300, seed=33)
    made = fit(labels, tmp_path / "r", scorers=["length", "tfidf"], force=True)
    assert not ladder.apgr_defined(made.splits.learn) and np.isfinite(made.rungs[0].value.value)
    text, length = made.rungs
    assert (made.selected.kind, text.kind) == ("tfidf", "tfidf")
    assert text.worth > length.worth + 0.05 and length.behind.value < -0.05
    assert made.evaluation.routed.quality.value > made.splits.test.right.mean(axis=0).max() + 0.1


@pytest.mark.parametrize("models", [2, 3])
def test_specialists_at_one_price_answer_what_they_are_good_at(models, tmp_path):
    labels = outcomes(900, 1, models=models)
    kinds = sorted(set(labels.groups))
    good = np.array([kinds.index(group) % models for group in labels.groups])
    chance = np.where(good[:, None] == np.arange(models), 0.9, 0.2)
    right = (np.random.default_rng(0).random(chance.shape) < chance).astype(float)
    labels = replace(labels, right=right, cost=np.full(right.shape, 2.0))
    made = fit(labels, tmp_path / "r", scorers=["text", "length"])
    assert made.selected.kind == "text"
    best = made.splits.test.right.mean(axis=0).max()
    assert made.evaluation.routed.quality.value > best + 0.15
    with Router.load(made.folder, ledger=None) as router:
        chosen = {router.choose(prompt).model for prompt in made.splits.test.prompts[:40]}
    assert len(chosen) == models


def test_the_best_is_kept_and_routes(fitted):
    assert fitted.selected.kind == "text"
    assert [r.kind for r in fitted.rungs][0] == "text"
    behind = {r.kind: r.behind for r in fitted.rungs}
    assert behind["random"].high < 0 and behind["length"].high < 0
    with Router.load(fitted.folder, ledger=None) as router:
        assert router.choose("times 345345 and 127645").model == "model-1"
        assert router.choose("total 345345 and 127645").model == "model-0"
        assert router.choose("Wie spät ist es denn?").novel


def test_the_threshold_keeps_the_goal_on_the_out_of_fold_predictions(fitted):
    assert fitted.threshold.quality >= 0.95 * fitted.threshold.strong_quality
    assert fitted.threshold.share < 0.6  # half of the prompts have nothing to gain
    assert fitted.threshold.n == len(fitted.splits.learn)
    assert "95 % of the large model's quality" in fitted.file.threshold.sentence


def test_what_it_was_made_on_is_left_out_of_a_measurement(fitted):
    used = fitted.splits.learn.prompts
    folder = fitted.file.fit_folder(fitted.folder)
    assert fitted_on(folder, [text.upper() for text in used]).all()
    assert not fitted_on(folder, fitted.splits.test.prompts).any()
    result = evaluate(fitted.folder, outcomes(1500, 1))
    assert result.report.n == len(fitted.splits.test)
    assert result.left_out == 1500 - result.report.n
    assert result.metrics["apgr"] == fitted.evaluation.metrics["apgr"]
    with pytest.raises(InvalidInput, match="all"):
        evaluate(fitted.folder, fitted.splits.learn)
    with pytest.raises(InvalidInput, match="are in ms, the router's in calls"):
        evaluate(fitted.folder, replace(outcomes(1500, 1), unit="ms"))


@pytest.mark.parametrize("kind", ["text", "tfidf"])
def test_new_prompts_of_the_same_kind_are_no_drift(kind, tmp_path):
    made = fit(outcomes(500, 1), tmp_path / "r", scorers=[kind], backends=BACKENDS, force=True)
    assert made.file.drift.n == len(made.splits.test)
    with Router.load(made.folder, ledger=None) as router:
        for seed in range(11, 15):
            right = calibrated(made.file, router.scorer.predict(outcomes(500, seed).prompts))
            assert not drift.compare(made.file.drift, (1 - right[:, 0]).tolist(), 1).drifted


def test_all_of_it_is_json(fitted):
    record = json.loads((fitted.file.fit_folder(fitted.folder) / "fit.json").read_text())
    assert record["selected"] == "text" and len(record["ladder"]) == 3
    assert record == json.loads(json.dumps(fitted.as_dict(), allow_nan=False))


def test_a_price_of_cost_takes_the_place_of_a_goal(tmp_path):
    labels = outcomes(600, 1, models=3)
    made = fit(
        labels, tmp_path / "r", scorers=["text"], lam=0.5,
        backends={"model-0": "nano-s", "model-1": "nano-l", "model-2": "openai:x@http://localhost"},
    )  # fmt: skip
    assert made.file.threshold.on == "worth" and made.file.threshold.value == 0.5
    shares = made.evaluation.routed.shares
    assert shares["model-2"] < 0.5 < shares["model-0"] + shares["model-1"]


def test_many_models_have_a_goal_too(tmp_path):
    made = fit(
        outcomes(600, 1, models=3), tmp_path / "r",
        scorers=["text", "random"], goal="30 % of calls",
        backends={"model-0": "nano-s", "model-1": "nano-l", "model-2": "openai:x@http://localhost"},
    )  # fmt: skip
    assert made.threshold.share <= 0.3
    assert made.rungs[0].kind == "text" and made.rungs[1].behind.value < 0


def test_a_stopped_fit_leaves_the_old_router_and_nothing_else(fitted, tmp_path, monkeypatch):
    out = tmp_path / "router"
    fit(outcomes(400, 1), out, scorers=["length"], force=True, backends=BACKENDS)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "pliant.routing.fitting.fit.write_hashes", stop
    )  # the scorer's files are written by then
    with pytest.raises(KeyboardInterrupt):
        fit(outcomes(400, 2), out, scorers=["length"], force=True, backends=BACKENDS)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [out]


_WRITER = """
import sys
from pliant.routing.live.decision import Decision
from pliant.routing.labels.label import JUDGE
from pliant.routing.live.decision import Costing
from pliant.routing.live.ledger import Ledger

with Ledger(sys.argv[1]) as ledger:
    print("open", flush=True)
    written = 0
    while not sys.stdin.readline().startswith("enough"):
        for _ in range(5):
            ledger.record("p", None, Decision("m", .5, .1, "r", "m"), 1.0, 0.0)
            written += 1
        print(written, flush=True)
"""


def test_a_refit_leaves_all_else_in_the_folder(tmp_path):
    """Another process has the ledger open, and goes on writing after each refit."""
    out = tmp_path / "router"

    def refit():
        fit(outcomes(300, 1), out, scorers=["length"], force=True, backends=BACKENDS)

    refit()
    (out / "notes").mkdir()
    mine = {"labels.jsonl": "labels", "notes/fit-day": "fit", "decisions.db": "db", "fit-notes": ""}
    for name, content in mine.items():
        (out / name).write_text(content)
    place = out / "ledger.sqlite"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(place)], **pipes) as writer:

        def say(word):
            writer.stdin.write(word + "\n")
            writer.stdin.flush()

        assert writer.stdout.readline() == "open\n"
        for written in (5, 10):
            say("on")
            assert int(writer.stdout.readline()) == written
            refit()
        say("enough")
    with Ledger(place) as ledger:
        assert ledger.report().decisions == 10
    assert {name: (out / name).read_text() for name in mine} == mine
    assert list(tmp_path.iterdir()) == [out]
    fits = [path.name for path in out.iterdir() if path.name not in ("fit-notes", *mine)]
    assert sum(name.startswith("fit-") for name in fits) == 1


@pytest.mark.parametrize("is_refit", [True, False])
def test_a_kill_leaves_a_router_at_every_moment(fitted, tmp_path, is_refit):
    """Killed as it renames, before and after each time: the old router or the new one; and where
    there was none, the same command does its work."""
    out = tmp_path / "router"
    old = at(out, fitted, "fit-00000000")
    if is_refit:
        write(old, fitted.selected.scorer)
        (out / "notes").write_text("mine")
    names, step, is_killed = [], 0, True
    while is_killed:
        new = at(out, fitted, f"fit-{step + 1:08}")
        child = os.fork()
        if child == 0:
            try:
                killed_at(step, out)
                write(new, fitted.selected.scorer)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        is_killed, step = os.WIFSIGNALED(status), step + 1
        if is_refit or (out / "router.json").exists():
            file, _ = router_file.open_router(out)
            names.append(file.scorer.folder)
        else:
            refuse_folder(out)  # which raises nothing
    assert step == 5 and len(names) == (5 if is_refit else 2)
    assert names == sorted(names) and names[-1] == new.file.scorer.folder
    assert not is_refit or names[0] == old.file.scorer.folder
    assert not is_refit or (out / "notes").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [out]
    assert [path.name for path in out.iterdir() if "fit-" in path.name] == ["fit-00000005"]


def at(out, fitted, name):
    scorer = fitted.file.scorer.model_copy(update={"folder": f"{name}/scorer"})
    file = fitted.file.model_copy(update={"scorer": scorer})
    return replace(fitted, folder=out, file=file)


def killed_at(step, folder):
    """From now on, kill this process before or after the so-manieth file or folder is renamed in
    this folder."""
    real, left = Path.replace, [step]

    def replace_(self, target):
        if target.parent != folder:
            return real(self, target)
        die(0)
        result = real(self, target)
        die(1)
        return result

    def die(after):
        if left[0] == after:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= after * 2

    Path.replace = replace_


def test_a_refit_replaces_a_router_of_the_first_version(tmp_path, root):
    out = shutil.copytree(root / "tests" / "fixtures" / "v0_1" / "router", tmp_path / "router")
    (out / "notes").write_text("mine")
    fit(outcomes(300, 1), out, scorers=["length"], force=True, backends=BACKENDS)
    names = {path.name for path in out.iterdir() if not path.name.startswith("fit-")}
    assert names == {"ledger.sqlite", "notes", "router.json"}
    assert evaluate(out, outcomes(300, 2)).report.n == 300


def test_prompts_that_one_model_was_not_asked_are_not_novel(tmp_path):
    known, others = outcomes(150, 1), poems(60)
    right = np.concatenate([known.right, others.right])
    right[150:, 0] = np.nan
    cost, prompts = np.concatenate([known.cost, others.cost]), known.prompts + others.prompts
    labels = Outcomes(prompts, known.models, right, cost)
    fitted = fit(labels, tmp_path / "router", scorers=["length"], force=True, backends=BACKENDS)
    _, scorer = router_file.open_router(fitted.folder)
    assert scorer.predict(poems(30, seed=1).prompts).novel.mean() < 0.2
    assert fitted.predictions.novel.shape == (len(fitted.splits.learn),)
    assert fitted.predictions.novel.mean() < 0.1


def test_a_router_that_changed_meanwhile_is_not_calibrated(fitted, tmp_path, monkeypatch):
    out = shutil.copytree(fitted.folder, tmp_path / "router")
    real = router_file.RouterFile.open_scorer

    def refitted(self, folder, device=None):
        scorer = real(self, folder, device)
        content = json.loads((out / "router.json").read_text())
        (out / "router.json").write_text(json.dumps({**content, "novel": "ignore"}))
        return scorer

    monkeypatch.setattr(router_file.RouterFile, "open_scorer", refitted)
    with pytest.raises(InvalidInput, match="again meanwhile: repeat"):
        calibrate(out, outcomes(300, 2), "20 % of calls")
    assert router_file.read(out).novel == "ignore"


def test_a_scorer_of_another_kind_than_the_file_says_is_named(fitted, tmp_path):
    router = shutil.copytree(fitted.folder, tmp_path / "router")
    scorer = router / fitted.file.scorer.folder
    shutil.rmtree(scorer)
    make("length").fit(outcomes(300, 1)).save(scorer)
    for use in (
        lambda: evaluate(router, outcomes(300, 2)),
        lambda: calibrate(router, outcomes(300, 2), "20 % of calls"),
        lambda: Router.load(router),
    ):
        with pytest.raises(InvalidInput, match="'length', and router.json says 'text'"):
            use()


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidInput, match="holds no router"):
        fit(outcomes(300), tmp_path, scorers=["length"], force=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("content", ["[]", "{", '{"routes": []}'])
def test_another_router_json_is_not_replaced(tmp_path, content):
    (tmp_path / "router.json").write_text(content)
    with pytest.raises(InvalidInput, match="name another folder"):
        fit(outcomes(300), tmp_path, scorers=["length"], force=True)
    assert (tmp_path / "router.json").read_text() == content


def test_what_cannot_be_fitted_is_said_before_the_work(tmp_path):
    for wrong, words in (
        ({"scorers": ["cpx"]}, "--base"),
        ({"scorers": ["texd"]}, "text"),
        ({"goal": "be quick"}, "no goal"),
    ):
        with pytest.raises(InvalidInput, match=words):
            fit(outcomes(300), tmp_path / "r", **wrong)
    assert not (tmp_path / "r").exists()


def test_a_new_goal_needs_no_training(fitted, tmp_path):
    made = fit(outcomes(600, 1), tmp_path / "r", scorers=["text"], backends=BACKENDS)
    scorer = made.folder / made.file.scorer.folder
    weights = (scorer / "scorer.safetensors").read_bytes()
    new = outcomes(400, 7)
    done = calibrate(made.folder, new, "40 % of calls")
    assert 0.1 < done.threshold.share <= 0.4 and done.left_out == 0
    assert router_file.read(made.folder).threshold.limit == done.threshold.value
    assert (scorer / "scorer.safetensors").read_bytes() == weights
    assert fitted_on(scorer.parent, new.prompts).all()
    again = calibrate(made.folder, new, "20 % of calls")
    assert again.threshold.share <= 0.2 and again.threshold.n == 400


def test_a_goal_at_which_the_router_saves_nothing_changes_nothing(fitted, tmp_path):
    router, new = shutil.copytree(fitted.folder, tmp_path / "router"), outcomes(300, 7)
    strict = "at most 0.01 % worse, with 99 % confidence"
    before = {path: path.read_bytes() for path in router.rglob("*") if path.is_file()}
    with pytest.raises(SavesNothing, match=r"stays as it is.*saves nothing.*--force") as error:
        calibrate(router, new, strict)
    assert {path: path.read_bytes() for path in router.rglob("*") if path.is_file()} == before
    refused = error.value.calibrated
    assert refused.threshold.share == 1 and not refused.verdict.pays
    forced = calibrate(router, new, strict, force=True)
    assert forced.as_dict() == refused.as_dict()
    assert router_file.read(router).threshold.limit == forced.threshold.value
    assert calibrate(router, outcomes(300, 8), "20 % of calls").verdict.pays
    budget = calibrate(router, outcomes(300, 9), "100 % of calls")  # set whatever it is worth
    assert not budget.verdict.pays and router_file.read(router).threshold.limit is not None


def test_the_labels_of_the_fit_serve_again_by_their_out_of_fold_predictions(fitted, tmp_path):
    router, goal = shutil.copytree(fitted.folder, tmp_path / "router"), "20 % of calls"
    learn = fitted.splits.learn
    own = calibrate(router, learn, goal)
    expected = choose_threshold(goal, fitted.predictions, learn)
    assert own.left_out == 0 and own.threshold.n == len(learn)
    assert own.threshold.value == pytest.approx(expected.value, abs=1e-6)
    assert own.threshold.shares == expected.shares
    of_the_fit = dict(fitted.file.calibration["model-0"])
    again = router_file.read(router).calibration["model-0"]
    assert again.pop("kind") == of_the_fit.pop("kind") == "platt"
    assert again == pytest.approx(of_the_fit, rel=1e-3)
    watched, before = router_file.read(router).drift, fitted.file.drift
    assert watched.n == before.n == len(fitted.splits.test), "of prompts that are new to it"
    assert watched.edges == pytest.approx(before.edges, abs=1e-3)
    halved = replace(learn, right=learn.right / 2)  # the same scores, by another calibration
    calibrate(router, halved, goal)
    assert min(router_file.read(router).drift.edges) > min(before.edges) + 0.1
    calibrate(router, learn, goal)
    assert not fitted_on(fitted.file.fit_folder(router), fitted.splits.test.prompts).any()
    every = calibrate(router, outcomes(1500, 1), goal)  # the test split by the fitted scorer
    assert every.left_out == 0 and every.threshold.n == 1500
    assert router_file.read(router).drift.n == len(fitted.splits.test)
    (fitted.file.fit_folder(router) / OUT_OF_FOLD).unlink()  # an older router
    with pytest.raises(InvalidInput, match="0 of these"):
        calibrate(router, learn, goal)
    older = calibrate(router, outcomes(1500, 1), goal)
    assert older.left_out == len(learn) and older.threshold.n == 1500 - len(learn)


def test_a_share_of_calls_needs_prompts_alone(fitted, tmp_path):
    made = fit(outcomes(300, 1), tmp_path / "r", scorers=["tfidf"], backends=BACKENDS)
    new, chats = outcomes(300, 7), outcomes(60, 8).prompts
    done = calibrate(made.folder, new.prompts, "30 % of calls")
    labelled = calibrate(made.folder, new, "30 % of calls")
    assert done.threshold.value == labelled.threshold.value and done.threshold.share <= 0.3
    assert done.threshold.shares == labelled.threshold.shares
    assert "prompts without labels" in str(done.threshold) and "not known" in str(done.threshold)
    assert Threshold.from_json(json.loads(json.dumps(done.threshold.to_json()))).share <= 0.3
    folder = made.file.fit_folder(made.folder)
    before = router_file.read(made.folder)
    done = calibrate(
        made.folder, [[{"role": "user", "content": t}] for t in chats], "30 % of calls"
    )
    after = router_file.read(made.folder)
    assert done.threshold.n == 60 == after.drift.n and after.calibration == before.calibration
    assert not fitted_on(folder, chats).any(), "they may still be labelled, and measured on"
    with pytest.raises(InvalidInput, match="needs labels"):
        calibrate(made.folder, new.prompts, "95 % of the large model's quality")
    with pytest.raises(InvalidInput, match="calibration 'isotonic': needs labels"):
        calibrate(made.folder, new.prompts, "30 % of calls", "isotonic")
    with pytest.raises(InvalidInput, match="no prompts"):
        calibrate(made.folder, [], "30 % of calls")


def test_prompts_alone_have_groups_where_the_scorer_needs_them(tmp_path):
    made = fit(
        outcomes(300, 1), tmp_path / "r", scorers=["group"], backends=BACKENDS, groups_known=True
    )
    new, before = outcomes(300, 7), (tmp_path / "r" / "router.json").read_bytes()
    for without in (new.prompts, replace(new, groups=None)):
        with pytest.raises(InvalidInput, match="scorer, group, needs the group of each prompt"):
            calibrate(made.folder, without, "40 % of calls")
    assert (tmp_path / "r" / "router.json").read_bytes() == before
    done = calibrate(made.folder, new.prompts, "40 % of calls", groups=new.groups)
    labelled = calibrate(made.folder, new, "40 % of calls")
    assert done.threshold.value == labelled.threshold.value and done.threshold.share > 0.1


@pytest.mark.parametrize("models", [2, 3])
def test_a_call_may_state_a_share_of_its_own(models, tmp_path):
    """Of the predictions that the thresholds come from, as many calls as fit; many prompts tie."""
    backends = {f"model-{j}": f"openai:m@http://127.0.0.1:9{j}/v1" for j in range(models)}
    made = fit(outcomes(500, 1, models=models), tmp_path / "r", scorers=["text"], backends=backends)
    gain, novel, new = made.predictions.gain, made.predictions.novel, outcomes(120, 9).prompts
    with Router.load(made.folder, ledger=None) as router:
        for share in (0.0, 0.3, 0.55, 1.0):
            rule = replace(router.file.rule, value=router.file.value_for(share))
            strong = np.mean(rule.choose(gain, novel) == models - 1)
            assert 0.6 * share <= strong <= max(share, novel.mean()), share
            of_new = router.scorer.predict(new)
            names = [router.file.names[j] for j in rule.choose(of_new.gain, of_new.novel)]
            assert [router.choose(prompt, share=share).model for prompt in new] == names
        between = router.file.value_for(0.32)
        assert router.file.value_for(0.35) <= between <= router.file.value_for(0.3)
        with pytest.raises(InvalidInput, match="between 0 and 1"):
            router.choose("times 1 and 2", share=30)
        usual = router.choose(new[0])
        assert usual == router.choose(new[0], share=None)
    older = router_file.make(**made.file.model_dump() | {"shares": []})
    with pytest.raises(InvalidInput, match="calibrate it, again"):
        older.value_for(0.3)


def test_a_new_calibration_leaves_what_the_user_set(tmp_path):
    made = fit(outcomes(300, 1), tmp_path / "r", scorers=["length"], force=True, backends=BACKENDS)
    path = made.folder / "router.json"
    content = json.loads(path.read_text())
    content["drift"] |= {"window": 50, "false_alarms": 0.2}
    content |= {"sticky": {"policy": "off"}, "novel": "ignore"}
    path.write_text(json.dumps(content))
    calibrate(made.folder, outcomes(200, 7), "40 % of calls")
    after = router_file.read(made.folder)
    assert (after.drift.window, after.drift.false_alarms) == (50, 0.2)
    assert after.drift.n == 200 and after.sticky.policy == "off" and after.novel == "ignore"


def test_novel_prompts_count_in_a_budget():
    held = outcomes(400, 3)
    gain = np.stack([np.zeros(400), held.gain + 0.001 * np.arange(400)], axis=1)
    novel = np.arange(400) % 5 == 0
    predictions = Predictions(None, gain, novel)
    chosen = choose_threshold(Goal.parse("30 % of calls"), predictions, held)
    assert chosen.share <= 0.3
    sent = novel | (gain[:, -1] > chosen.value)
    assert sent.mean() == pytest.approx(chosen.share)
    ignored = choose_threshold(Goal.parse("30 % of calls"), predictions, held, novel_to=None)
    assert ignored.value < chosen.value


def test_a_router_that_saves_nothing_is_not_written_unless_it_is_forced(tmp_path):
    """The length says nothing here, so the default goal sends everything to the strong model."""
    out = tmp_path / "r"
    with pytest.raises(SavesNothing, match="saves nothing.*--force") as error:
        fit(outcomes(300, 1), out, scorers=["length"], backends=BACKENDS)
    assert not out.exists() and not error.value.fitted.verdict.pays
    assert error.value.fitted.evaluation.routed.share == 1
    fit(outcomes(300, 1), out, scorers=["length"], backends=BACKENDS, force=True)
    before = (out / "router.json").read_bytes()
    with pytest.raises(SavesNothing):
        fit(outcomes(300, 3), out, scorers=["length"], backends=BACKENDS)
    assert (out / "router.json").read_bytes() == before


def test_what_the_labels_used_is_the_router_s_label_cost(tmp_path):
    used = {name: Used(calls=2400, flops=9.0) for name in ("model-0", "model-1")}
    made = fit(
        outcomes(300, 1),
        tmp_path / "r",
        scorers=["length"],
        force=True,
        backends=BACKENDS,
        label_cost=used,
    )
    assert made.file.label_cost["model-1"] == used["model-1"].as_dict()


@pytest.mark.parametrize("unit", ["calls", "tokens"])
def test_the_labels_cost_what_the_table_says(unit, tmp_path):
    labels = outcomes(300, 1)
    labels = replace(labels, cost=np.tile([0.001, 0.01], (300, 1)), unit=unit)
    made = fit(labels, tmp_path / "r", scorers=["length"], force=True, backends=BACKENDS)
    assert Costing(router_file.read(made.folder)).labels() == pytest.approx(3.3)
    rows = tables.labels(ReportData(made.folder, made.file, None, (), None)).rows
    assert [row[1] for row in rows] == ["300", "300", ""]
    assert [row[2] for row in rows] == [amount(cost, unit) for cost in (0.3, 3.0, 3.3)]


def test_what_the_judge_used_counts_among_the_labels(tmp_path):
    used = {name: Used(calls=300, usd=1.0) for name in ("model-0", "model-1")}
    used[JUDGE] = Used(calls=600, usd=4.0)
    labels = replace(outcomes(300, 1), unit="usd")
    made = fit(
        labels, tmp_path / "r", scorers=["length"], force=True, backends=BACKENDS, label_cost=used
    )
    with Router.load(made.folder, ledger=None) as router:
        assert router.report()["label_cost"] == 6.0


def test_scoring_costs_the_time_that_was_measured_where_time_is_the_unit(tmp_path):
    made = fit(
        replace(outcomes(300, 1), unit="ms"),
        tmp_path / "r",
        scorers=["length"],
        force=True,
        backends=BACKENDS,
    )
    assert made.file.scorer.cost == made.selected.ms > 0


def test_a_place_where_nothing_can_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="cannot be written"):
        fit(outcomes(300), tmp_path / "file" / "r", scorers=["no scorer"])


def test_the_area_of_two_models_is_their_metric_and_of_more_rewards_knowing():
    many = outcomes(800, 5, models=3)
    knowing = make("text").fit(outcomes(800, 6, models=3)).predict(many.prompts).gain
    chance = make("random").fit(many).predict(many.prompts).gain
    a, b = rung("text", knowing), rung("text", chance)
    assert ladder.gap(a, b, many).low > 0


@pytest.mark.parametrize("models", [2, 3])
def test_scorers_are_worth_what_they_gain_at_equal_cost(models):
    """What scoring costs cannot be spent on calls: all of it, and nothing is left."""
    labels = outcomes(800, 5, models=models)
    gain = make("text").fit(outcomes(800, 6, models=models)).predict(labels.prompts).gain
    free, some, half, all_of_it = (
        ladder.value_of(gain, labels, np.full(models, cost)).value for cost in (0, 0.001, 0.5, 1)
    )
    assert free == pytest.approx(ladder.value_of(gain, labels).value)
    assert free > some > half > all_of_it and free - some < 0.005
    if models == 2:  # by hand: a perfect line up to half of the calls, then level
        assert all_of_it == 0
        assert ladder.value_of(np.zeros((800, 2)), labels, np.full(2, 0.5)).value == (
            pytest.approx(0.125, abs=1e-3)  # the triangle under the diagonal up to a half
        )
        kept = ladder.value_of(gain, labels, np.array([0.0, 0.5])).value
        assert half < kept < free, "answers of the cheap model continue from the scoring"


@pytest.mark.parametrize("scoring", [(20.0, 0.0), (10.0, 0.0), (10.0, 10.0), (0.0, 10.0)])
def test_scoring_that_costs_the_whole_difference_leaves_nothing_to_recover(scoring):
    """Also where the strong model's answer continues from the scoring and pays nothing for it."""
    labels = outcomes(400, 5)
    labels = replace(labels, cost=np.tile([90.0, 100.0], (400, 1)))
    gain = np.stack([np.zeros(400), labels.gain], axis=1)
    value = ladder.value_of(gain, labels, np.array(scoring)).value
    assert value == 0 if scoring[0] else 0 < value < ladder.value_of(gain, labels).value


def test_a_scorer_that_ties_and_costs_nothing_is_kept(monkeypatch, tmp_path):
    """Labels in flops: as good an order, but reading a model costs half of what can be saved."""
    labels = replace(outcomes(500, 1), unit="flops")

    class Reads(kind_class("text")):
        kind = "knn"

        def flops(self, prompts):
            return 0.5

    monkeypatch.setattr(ladder, "make", lambda kind: Reads() if kind == "knn" else make(kind))
    made = fit(labels, tmp_path / "r", scorers=["knn", "text"], backends=BACKENDS)
    assert made.selected.kind == "text" and made.rungs[0].kind == "text"
    read = made.rungs[1]
    assert read.value.value == made.rungs[0].value.value and read.behind.high < -0.2
    forced = fit(labels, tmp_path / "f", scorers=["knn"], backends=BACKENDS, force=True)
    assert forced.file.scorer.cost == 0.5 and forced.verdict.scoring == 0.5
    cost = forced.verdict.cost - forced.threshold.share
    assert cost == pytest.approx(0.5, abs=0.1)
    file = router_file.read(tmp_path / "r")
    scorer = file.scorer.model_copy(update={"cost": 0.5})
    file.model_copy(update={"scorer": scorer}).write(tmp_path / "r")
    new = replace(outcomes(300, 9), unit="flops")
    again = calibrate(tmp_path / "r", new, "30 % of calls").threshold
    for chosen in (forced.threshold, again):  # a call costs 1, and a budget pays for scoring
        assert chosen.cost == pytest.approx(chosen.share + 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrate_by": "plat"}, "no calibration 'plat'"),
        ({"backends": {"model-9": "nano-s"}}, "no model 'model-9'"),
        ({"scorers": ["length", "text+group"]}, "text+group needs labels with a column of groups"),
        ({"scorers": ["length", "texd"]}, "no scorer is called 'texd'"),
        ({"lam": 1.0, "goal": "30 % of calls"}, "goal and lam both set the threshold"),
        ({"backends": {"model-0": "openai:m@http://["}}, "an address after openai:MODEL@ is none"),
        ({"goal": "at most $3 per 1,000 prompts"}, "in calls, not usd"),
    ],
)
def test_a_wrong_option_is_said_before_anything_is_fitted(tmp_path, options, message):
    def fitted(items, what):
        raise AssertionError("a scorer was fitted")

    with pytest.raises(InvalidInput, match=re.escape(message)):
        options = {"scorers": ["length"], **options}
        fit(replace(outcomes(300), groups=None), tmp_path / "r", progress=fitted, **options)
