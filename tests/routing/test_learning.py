"""Learning: graded answers in the ledger correct a router, in one step, and only once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.routing.labels import outcomes
from tests.routing.live.test_grades import answered
from tests.routing.minimal_scorer import content
from tests.routing.scorers.test_corrections import noticing, poems

from pliant.errors import InvalidInput
from pliant.routing import learn, router_file
from pliant.routing.fitting.calibrating import calibrate
from pliant.routing.fitting.splits import fitted_on, write_hashes
from pliant.routing.learning import FEWEST, labels
from pliant.routing.live.ledger import Ledger
from pliant.routing.outcomes import Outcomes
from pliant.routing.router import Router
from pliant.routing.router_file import make
from pliant.routing.scorers.corrections import CORRECTIONS, write_background

TRAIN = outcomes(300, 1).of_models(("model-0", "model-1"))
MODELS = [
    {"name": name, "backend": f"{name}=nano-s", "cost": cost}
    for name, cost in (("model-0", 1.0), ("model-1", 5.0))
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A router as a fit leaves it, that explores."""
    place = tmp_path / "router"
    file = make(
        **content(
            models=MODELS,
            default="model-1",
            scorer={"kind": "text", "folder": "fit-00000000/scorer"},
            explore={"share": 0.2},
            ledger={"prompts": True},
        )
    )
    scorer = noticing(TRAIN)
    Router(file, scorer).save(place)
    write_background(place / "fit-00000000/scorer", TRAIN.prompts)
    predictions = scorer.predict(TRAIN.prompts)  # not out of fold, but nothing here depends on it
    write_hashes(place / "fit-00000000", TRAIN.prompts, predictions)
    return place


def explore(folder: Path, asked: Outcomes, graded: int | None = None, group: str = "") -> None:
    """What a router leaves in its ledger that explored these prompts."""
    with Ledger(folder / "ledger.sqlite", prompts=True) as ledger:
        for i, prompt in enumerate(asked.prompts):
            row = answered(ledger, prompt, "model-1")
            answers = {"model-0": ("4", 1.0), "model-1": ("four", 5.0)}
            ledger.grades.explored(row, prompt, group or None, answers, [])
            for j, name in enumerate(answers):
                if graded is None or i < graded:
                    ledger.grades.grade(row, asked.right[i, j], name)


def everything(folder: Path) -> dict[str, bytes]:
    """All files but the ledger's, which opening changes."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p): p.read_bytes() for p in paths if not p.name.startswith("ledger")}


def gains(folder: Path, prompts: tuple[str, ...]) -> np.ndarray:
    return router_file.open_router(folder)[1].predict(prompts).last_gain


def test_a_router_learns_a_new_task_and_forgets_nothing(folder: Path) -> None:
    new, known = poems(30, seed=1).prompts, outcomes(100, 4).prompts
    before = gains(folder, known)
    explore(folder, poems(40), graded=35)
    learned = learn(folder)
    assert (learned.prompts, learned.new, learned.waiting) == (35, 35, 5)
    assert learned.after < 0.5 * learned.error
    assert "35 graded prompts, 35 of them new" in str(learned) and "5 explored" in str(learned)
    with Router.load(folder) as router:
        decisions = [router.choose(prompt) for prompt in new]
    assert sum(decision.novel for decision in decisions) <= 3
    assert {decision.model for decision in decisions} == {"model-1"}
    assert np.array_equal(gains(folder, known), before)
    assert fitted_on(folder / "fit-00000000", poems(40).prompts).sum() == 35


def test_a_task_that_the_weak_model_can_do_costs_less_from_then_on(folder: Path) -> None:
    explore(folder, poems(60, right=(1.0, 1.0)))
    learn(folder)
    with Router.load(folder) as router:
        models = [router.choose(prompt).model for prompt in poems(30, seed=1).prompts]
    assert models.count("model-0") >= 27


def test_learning_the_same_again_changes_no_file(folder: Path) -> None:
    explore(folder, poems(30))
    learn(folder)
    before = everything(folder)
    again = learn(folder)
    assert again.new == 0 and "Nothing new" in str(again)
    assert everything(folder) == before


def test_learning_goes_on_where_it_stopped_even_with_another_ledger(folder: Path) -> None:
    explore(folder, poems(30))
    learn(folder)
    (folder / "ledger.sqlite").unlink()
    explore(folder, outcomes(25, 7))
    learned = learn(folder)
    assert (learned.prompts, learned.new) == (55, 25)


def test_an_interrupted_learning_leaves_the_old_router(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explore(folder, poems(30))
    prompts = poems(30, seed=1).prompts
    before = gains(folder, prompts)

    replace = Path.replace

    def stop(path: Path, target: Path) -> None:
        if target.name == CORRECTIONS:
            raise KeyboardInterrupt
        replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            learn(folder)
    assert np.array_equal(gains(folder, prompts), before)
    assert not [name for name in everything(folder) if "unfinished" in name]
    assert learn(folder).new == 30


def test_a_threshold_is_chosen_on_predictions_with_what_was_learned(folder: Path) -> None:
    asked = outcomes(200, 9).of_models(TRAIN.models)
    proofs = asked.select(np.array(asked.groups) == "prove")  # both models fail nearly all of them
    before = gains(folder, TRAIN.prompts)
    explore(folder, replace(proofs, right=[[0.0, 1.0]] * len(proofs)))
    learn(folder)
    threshold = calibrate(folder, TRAIN, "30 % of calls").threshold
    assert not np.allclose(gains(folder, TRAIN.prompts), before, atol=0.1)
    file, scorer = router_file.open_router(folder)
    live = scorer.predict(TRAIN.asked)
    assert TRAIN.shares(file.rule.choose(live.gain, live.novel)) == pytest.approx(threshold.shares)


def test_no_threshold_is_chosen_on_a_prompt_that_its_own_grade_corrects(folder: Path) -> None:
    assert calibrate(folder, TRAIN, "30 % of calls").left_out == 0
    explore(folder, TRAIN.select(range(30)))
    learn(folder)
    calibrated = calibrate(folder, TRAIN, "30 % of calls")
    assert (calibrated.left_out, calibrated.threshold.n) == (30, len(TRAIN) - 30)


def test_graded_prompts_are_labels_to_fit_again_with(folder: Path) -> None:
    explore(folder, poems(3), group="poems")
    explore(folder, poems(1, right=(1.0, 1.0)), group="poems")
    table = labels(folder)
    assert table.models == ("model-0", "model-1") and table.groups == ("poems",) * 3
    assert table.unit == "calls" and table.cost.tolist() == [[1.0, 5.0]] * 3
    assert sorted(table.right[:, 0].tolist()) == [0.0, 0.0, 0.5], "the mean of its grades"


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda folder: None, "there is no ledger"),
        (lambda folder: explore(folder, poems(FEWEST + 5), graded=FEWEST - 1), "19 explored.*6"),
        (lambda folder: explore(folder, poems(3), graded=0), "0 explored"),
    ],
)
def test_what_cannot_be_learned_from_is_named(
    folder: Path, prepare: Callable[[Path], None], expected: str
) -> None:
    prepare(folder)
    with pytest.raises(InvalidInput, match=expected):
        learn(folder)
    assert not list(folder.rglob(CORRECTIONS))
