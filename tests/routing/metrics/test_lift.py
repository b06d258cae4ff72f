"""Quality against cost of any number of models, beside what single models have at each budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.routing.labels import outcomes, specialists

from pliant.routing.metrics.lift import area_difference, areas
from pliant.routing.metrics.ranking import ahead, aiq, report


def gains(right: np.ndarray) -> np.ndarray:
    return right - right[:, :1]


def test_at_one_price_it_is_the_quality_beyond_the_best_single_model() -> None:
    labels = specialists(1000, 0)
    perfect = areas(gains(labels.right), labels)
    alone = labels.right.mean(axis=0).max()
    assert perfect["aiq"].value == pytest.approx(labels.right.max(axis=1).mean())
    assert perfect["lift"].value == pytest.approx(labels.right.max(axis=1).mean() - alone)
    constant = areas(np.zeros((1000, 2)), labels)
    assert constant["lift"].value == pytest.approx(labels.weak.mean() - alone)


@pytest.mark.parametrize("models", [2, 3])
def test_without_information_there_is_no_lift_at_any_price(models: int) -> None:
    labels = outcomes(3000, 0, models=models)
    noise = np.random.default_rng(0).normal(0, 0.3, labels.right.shape)
    assert abs(areas(gains(noise), labels)["lift"].value) < 0.02
    assert areas(gains(labels.right), labels)["lift"].low > 0.1


def test_of_two_models_it_is_the_area_that_aiq_measures() -> None:
    labels = outcomes(2000, 1)
    predicted = gains(labels.right) * 0.5 + gains(np.random.default_rng(0).random((2000, 2)))
    assert areas(predicted, labels)["aiq"].value == pytest.approx(
        aiq(predicted[:, 1], labels), abs=0.003
    )


def test_budgets_pay_for_scoring() -> None:
    labels = outcomes(1000, 0, models=3)
    free = areas(gains(labels.right), labels)["aiq"].value
    paid = areas(gains(labels.right), labels, scoring=[0.3, 0.3, 0.3])["aiq"].value
    nothing_left = areas(gains(labels.right), labels, scoring=[2, 2, 2])["aiq"].value
    assert free > paid > nothing_left == pytest.approx(labels.weak.mean())


def test_a_report_ranks_by_apgr_only_where_shares_of_calls_mean_something() -> None:
    two, three, one_price = outcomes(500, 0), outcomes(500, 0, models=3), specialists(500, 0)
    for labels, names in ((two, {"apgr", "cpt50"}), (three, set()), (one_price, set())):
        measured = report(gains(labels.right), labels, resamples=20)
        assert names <= set(measured.metrics) and {"aiq", "lift"} <= set(measured.metrics)
        assert ("apgr" in measured.metrics) == bool(names)
        assert measured.metrics["lift"].value == pytest.approx(measured.oracle_lift)
    flat = np.zeros(three.right.shape)
    assert ahead(gains(three.right), flat, three).value == pytest.approx(
        area_difference(gains(three.right), flat, three).value
    )
    assert ahead(two.gain, np.zeros(500), two).low > 0.3


def test_prices_that_a_router_decides_by_may_differ_from_what_is_paid() -> None:
    labels = outcomes(500, 0, models=3)
    wrong = areas(gains(labels.right), labels, prices=[5, 1, 0])["aiq"].value
    assert wrong < areas(gains(labels.right), labels)["aiq"].value
    cheaper = replace(labels, cost=labels.cost / 7)
    assert areas(gains(labels.right), cheaper)["aiq"].value == pytest.approx(
        areas(gains(labels.right), labels)["aiq"].value
    )
