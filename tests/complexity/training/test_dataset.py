"""Rows become ids and labels; whatever cannot be a label is named with its row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pliant.complexity.training.dataset import dataset_of, labels_of, similar_length_order
from pliant.errors import InvalidInput


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        ([0, 1, True, "0.25", "true", " FALSE "], {}, [[0], [1], [1], [0.25], [1], [0]]),
        ([[0.5], "[1]"], {}, [[0.5], [1.0]]),
        ([[0, 1], "[0.5, 0.25]"], {"outputs": ("right:a", "right:b")}, [[0, 1], [0.5, 0.25]]),
        ([[1, -0.5]], {"outputs": ("score", "gain")}, [[1, -0.5]]),
        ([2, "0"], {"loss": "ce", "outputs": ("a", "b", "c")}, [2, 0]),
        ([1, [0.5, 0.5]], {"loss": "ce", "outputs": ("a", "b")}, [[0, 1], [0.5, 0.5]]),
        ([-3, 12.5], {"loss": "regression"}, [[-3], [12.5]]),
    ],
)
def test_labels(values: list[Any], settings: dict[str, Any], expected: list[Any]) -> None:
    assert labels_of(values, **settings).tolist() == expected


@pytest.mark.parametrize(
    ("value", "settings"),
    [
        (1.5, {}),
        (-0.1, {}),
        ("hard", {}),
        ("", {}),
        ([], {}),
        ([0, 1], {}),
        ({"score": 1}, {}),
        (float("nan"), {"loss": "regression"}),
        (10**400, {"loss": "regression"}),
        ([1, -1.5], {"outputs": ("score", "gain")}),
        (0.5, {"loss": "ce", "outputs": ("a", "b")}),
        (2, {"loss": "ce", "outputs": ("a", "b")}),
        ([0.5, 0.6], {"loss": "ce", "outputs": ("a", "b")}),
    ],
)
def test_a_bad_label_is_named_with_its_row(value: Any, settings: dict[str, Any]) -> None:
    good: Any = [1.0, 0.0] if len(settings.get("outputs", "1")) == 2 else 0
    with pytest.raises(InvalidInput, match=r"row 3: label .* cannot be used: give "):
        labels_of([good, good, value], **settings)


def test_rows_may_come_in_several_forms() -> None:
    def encode(prompts: Any) -> Any:
        return [p if isinstance(p, list) else [ord(c) for c in p] for p in prompts]

    texts = dataset_of([{"text": "ab", "label": 0}, {"text": "c", "label": 1}], encode)
    ids = dataset_of(
        [{"input_ids": [97, 98], "labels": 0}, {"input_ids": [99], "labels": 1}], encode
    )
    assert texts.lengths == ids.lengths == [2, 1] and texts.tokens == 3
    assert texts.labels is not None and ids.labels is not None
    assert texts.labels.tolist() == ids.labels.tolist() == [[0.0], [1.0]]
    with pytest.raises(InvalidInput, match=r"no prompt \(looked for .*\); they have question"):
        dataset_of([{"question": "a"}], encode)
    with pytest.raises(InvalidInput, match="row 2: has no 'label'"):
        dataset_of([{"text": "a", "label": 0}, {"text": "b", "label": None}], encode)
    with pytest.raises(InvalidInput, match="row 1: the prompt is empty"):
        dataset_of([{"text": "", "label": 0}], encode)
    with pytest.raises(InvalidInput, match="no rows"):
        dataset_of([], encode)


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=300),
    st.integers(1, 16),
    st.integers(0, 5),
)
def test_an_epoch_has_every_prompt_once(lengths: list[int], batch: int, epoch: int) -> None:
    order = similar_length_order(torch.tensor(lengths), batch, 0, epoch)
    assert sorted(order) == list(range(len(lengths)))
    assert order == similar_length_order(torch.tensor(lengths), batch, 0, epoch)


def test_companions_change_and_lengths_are_alike() -> None:
    lengths = torch.randint(1, 200, (4000,), generator=torch.Generator().manual_seed(0))
    epochs = [torch.tensor(similar_length_order(lengths, 16, 0, e)).split(16) for e in range(2)]
    pairs = [{frozenset(b[[i, i + 1]].tolist()) for b in e for i in range(15)} for e in epochs]
    assert len(pairs[0] & pairs[1]) < 0.1 * len(pairs[0])
    padded = sum(int(lengths[b].max()) * len(b) for b in epochs[0])
    assert padded < 1.05 * int(lengths.sum())  # at random it would be 1.9
    firsts = [lengths[b].float().mean() for b in epochs[0]]
    assert torch.stack(firsts[:60]).std() > 20  # the batches come in no order of length
