"""Ridge regression on blocks of features: both solutions agree, and a fold's labels stay unseen."""

from __future__ import annotations

import numpy as np
import pytest
from tests.routing.labels import outcomes

from pliant.routing.scorers import blocks
from pliant.routing.scorers.blocks import STRENGTHS, Blocks, Weights, cross_validated, solve
from pliant.routing.scorers.linear import folds
from pliant.routing.scorers.text import Text

LABELS = outcomes(240, 1)
PARTITIONS = [folds(LABELS, 4, seed) for seed in range(2)]


@pytest.fixture(scope="module")
def text() -> Text:
    return Text().fit(LABELS)


@pytest.fixture(scope="module")
def x(text: Text) -> Blocks:
    return text._blocks(LABELS.prompts, None)


def test_similarities_are_inner_products_of_all_features(x: Blocks) -> None:
    """Written out, as they never are elsewhere."""
    some = x.select(np.arange(12))
    products = np.einsum("nt,nv->ntv", some.topics, some.waves).reshape(len(some), -1)
    written = np.hstack([some.words.toarray(), some.dense, blocks._PRODUCTS**0.5 * products])
    assert np.allclose(some.similarity(some), written @ written.T)


def test_weights_predict_sums_of_similarities(text: Text, x: Blocks) -> None:
    new = text._blocks(outcomes(40, 2).prompts, None)
    coefficients = np.random.default_rng(0).normal(size=(len(x), 3))
    bias = np.array([0.1, 0.2, 0.3])
    predicted = x.combined(coefficients, bias)(new)
    assert np.allclose(predicted, new.similarity(x) @ coefficients + bias)


def test_weights_are_the_same_after_saving(x: Blocks) -> None:
    weights = solve(x, LABELS.right, 8.0)
    again = Weights.from_arrays(weights.arrays("a."), "a.")
    assert np.allclose(again(x), weights(x), atol=1e-5)


@pytest.mark.parametrize("strength", [STRENGTHS[0], 20.0, STRENGTHS[-1]])
def test_the_direct_and_the_iterated_solution_agree(
    strength: float, x: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = solve(x, LABELS.right, strength)(x)
    monkeypatch.setattr(blocks, "DIRECT", 50)
    assert np.allclose(solve(x, LABELS.right, strength)(x), direct, atol=5e-3)
    assert np.ptp(direct[:, 0]) > 0.05


def test_many_rows_are_cross_validated_like_few(x: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another solution, with the strength chosen on a sample of the rows."""
    _, direct = cross_validated(x, LABELS.right, PARTITIONS, (8.0,))
    monkeypatch.setattr(blocks, "DIRECT", 50)
    strength, iterated = cross_validated(x, LABELS.right, PARTITIONS, (8.0,))
    assert strength == 8.0 and np.allclose(iterated, direct, atol=5e-3)
    assert cross_validated(x, LABELS.right, PARTITIONS)[0] in STRENGTHS


@pytest.mark.parametrize("many", [False, True])
def test_the_predictions_of_a_fold_do_not_use_its_labels(
    many: bool, x: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the mean of all labels, which is the same for all prompts, and here stays."""
    if many:
        monkeypatch.setattr(blocks, "DIRECT", 50)
    first, *others = PARTITIONS[0]
    changed = LABELS.right.copy()
    changed[first] = changed[first][::-1]
    before, after = (
        cross_validated(x, right, PARTITIONS[:1], (8.0,))[1] for right in (LABELS.right, changed)
    )
    assert np.allclose(after[first], before[first], atol=1e-12)
    assert not np.allclose(after[np.concatenate(others)], before[np.concatenate(others)], atol=0.01)


def test_the_strength_fits_the_noise(x: Blocks) -> None:
    """Labels that no feature explains get the heaviest penalty, and those of the words do not."""
    noise = np.random.default_rng(0).integers(0, 2, LABELS.right.shape).astype(float)
    assert cross_validated(x, noise, PARTITIONS)[0] == STRENGTHS[-1]
    assert cross_validated(x, LABELS.right, PARTITIONS)[0] < STRENGTHS[-1]
