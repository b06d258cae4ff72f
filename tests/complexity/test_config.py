"""The settings of a scorer, and the errors for wrong ones."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from pliant.complexity import CPXConfig, Scores
from pliant.errors import InvalidInput


@pytest.mark.parametrize(
    ("settings", "outputs"),
    [
        ({}, ("score",)),
        ({"num_labels": 1}, ("score",)),
        ({"num_labels": 3}, ("label_0", "label_1", "label_2")),
        ({"outputs": ("score", "gain")}, ("score", "gain")),
        ({"outputs": ["score", "gain"], "num_labels": 2}, ("score", "gain")),
        ({"outputs": "hard"}, ("hard",)),
    ],
)
def test_outputs_have_names(settings: dict[str, Any], outputs: tuple[str, ...]) -> None:
    config = CPXConfig(**settings)
    assert config.outputs == outputs and config.num_labels == len(outputs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 0}, "rows = 0"),
        ({"rows": 1.5}, "rows = 1.5"),
        ({"rows": True}, "rows = True"),
        ({"layer": 0}, "layer = 0"),
        ({"lora_rank": -1}, "lora_rank = -1"),
        ({"lora_alpha": 0}, "lora_alpha = 0: give a number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"outptus": ("a",)}, "unexpected keyword argument 'outptus'; did you mean 'outputs'"),
        ({"num_labels": 0}, "num_labels = 0"),
        ({"num_labels": 3, "outputs": ("a", "b")}, "num_labels = 3, and outputs names 2"),
        ({"outputs": ("a", "a")}, "'a' is repeated"),
        ({"outputs": ("a", "")}, "is not a name"),
        ({"aggregation": "first"}, "aggregation = 'first': give one of last, mean"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        CPXConfig(**settings)


@given(
    rows=st.integers(1, 8),
    outputs=st.lists(st.text(min_size=1), min_size=1, unique=True).map(tuple),
    layer=st.none() | st.integers(1, 99),
    rank=st.integers(0, 8),
    targets=st.lists(st.sampled_from(["q_proj", "v_proj"])).map(tuple),
)
def test_a_config_comes_back_from_json(
    rows: int, outputs: tuple[str, ...], layer: int | None, rank: int, targets: tuple[str, ...]
) -> None:
    config = CPXConfig(rows, outputs, layer=layer, lora_rank=rank, lora_targets=targets)
    adapter = TypeAdapter(CPXConfig)
    assert adapter.validate_python(asdict(config)) == config
    assert adapter.validate_json(adapter.dump_json(config)) == config


def test_the_lora_scale_is_alpha_over_rank() -> None:
    assert CPXConfig(lora_rank=4, lora_alpha=2).scale == 0.5
    assert CPXConfig(lora_rank=4).scale == 2.0
    assert CPXConfig().scale == 0.0


# --- scores ---------------------------------------------------------------------------------------

LOGITS = np.array([[0.0, 0.5], [100.0, -0.25], [-800.0, 0.0]])


def test_a_gain_that_was_fitted_beyond_one_is_a_difference_of_probabilities() -> None:
    scores = Scores(("score", "gain"), np.array([[0.0, 1.569], [0.0, -1.2], [0.0, 0.9]]))
    assert scores.gain is not None and 0.95 < scores.gain[0] < 1 and -1 < scores.gain[1] < -0.95
    assert scores.gain[2] == 0.9 and scores["gain"].tolist() == scores.gain.tolist()


def test_a_score_is_a_probability_and_a_gain_is_linear() -> None:
    scores = Scores(("score", "gain"), LOGITS)
    assert scores.score.tolist() == [0.5, 1.0, 0.0] and len(scores) == 3
    assert scores.gain is not None and scores.gain.tolist() == [0.5, -0.25, 0.0]


def test_of_models_that_are_right_the_first_is_this_one() -> None:
    scores = Scores(("right:small", "right:large"), np.array([[0.0, 2.0]]))
    right = 1 / (1 + np.exp(-2.0))
    assert scores.score == pytest.approx([0.5])
    assert scores.gain == pytest.approx([right - 0.5])
    assert scores["right:large"] == pytest.approx([right])


def test_classes_share_one_probability() -> None:
    scores = Scores(("maths", "code"), LOGITS, reads="classes")
    assert scores.values.sum(axis=1) == pytest.approx([1, 1, 1])
    assert scores["maths"][1:] == pytest.approx([1, 0]) and scores.values[0, 0] < 0.5


def test_numbers_are_as_the_head_gave_them_and_no_score() -> None:
    scores = Scores(("score", "gain"), LOGITS, reads="numbers")
    assert scores["score"].tolist() == [0.0, 100.0, -800.0]
    assert scores.gain is not None and scores.gain.tolist() == [0.5, -0.25, 0.0]
    with pytest.raises(InvalidInput, match=r"a number, not a probability: .*scores\['score'\]"):
        _ = scores.score
    assert Scores(("right:a", "right:b"), LOGITS, reads="numbers").gain is None


def test_scores_are_a_sentence_and_a_dictionary() -> None:
    scores = Scores(("score", "gain"), np.array([[0.0, 0.25], [0.0, 0.75]]), truncated=1)
    assert str(scores) == "2 prompts scored, mean score 0.500, mean gain 0.500, 1 truncated"
    assert scores.as_dict() == {
        "values": {"score": [0.5, 0.5], "gain": [0.25, 0.75]},
        "logits": [[0.0, 0.25], [0.0, 0.75]],
        "truncated": 1,
        "reads": "probabilities",
    }


def test_how_outputs_are_read_is_one_of_three() -> None:
    with pytest.raises(InvalidInput, match="reads = 'odds'"):
        CPXConfig(reads="odds")  # type: ignore[arg-type]


def test_outputs_of_another_kind_are_taken_by_name() -> None:
    scores = Scores(("maths", "code"), LOGITS)
    assert scores.gain is None and scores["maths"].tolist() == [0.5, 1.0, 0.0]
    with pytest.raises(InvalidInput, match="maths, code"):
        _ = scores.score
    with pytest.raises(InvalidInput, match="no output is called 'law'"):
        scores["law"]
