"""docs/architectures.md is right: each row is measured again."""

from __future__ import annotations

import pytest
import transformers
from tests.contracts.conftest import specimen
from tests.contracts.page import PAGE

from pliant.anatomy.tiny import causal_lm_types, variants
from pliant.survey import ask, by_part

same_version = pytest.mark.skipif(
    transformers.__version__ != PAGE.transformers_version,
    reason=f"the page was made with transformers {PAGE.transformers_version}",
)


@same_version
@pytest.mark.parametrize("name", sorted([*causal_lm_types(), *variants()]))
def test_the_page_says_what_is_measured(name: str) -> None:
    answers = ask(specimen(name))
    measured = {column: answer.ok for column, answer in answers.items()}
    stated = dict(zip(PAGE.columns, PAGE.rows[name], strict=True))
    assert measured == stated, {c: a.reason for c, a in answers.items() if a.ok != stated[c]}


def test_the_page_has_a_column_for_every_capability() -> None:
    assert PAGE.columns == tuple(capability.name for capability in by_part())


@same_version
def test_the_page_has_a_row_for_every_type_and_variant() -> None:
    assert set(PAGE.rows) == {*causal_lm_types(), *variants()}


def test_every_no_has_its_reason() -> None:
    bare = [
        (name, column)
        for name, cells in PAGE.rows.items()
        for column, yes, note in zip(PAGE.columns, cells, PAGE.notes[name], strict=True)
        if not yes and note not in PAGE.reasons
    ]
    assert bare == []


@pytest.mark.parametrize(
    ("column", "least"),
    [("runs", 182), ("layers", 175), ("attention", 175), ("first k", 160), ("export", 60)],
)
def test_the_reach_is_as_promised(column: str, least: int) -> None:
    assert PAGE.count(column) >= least


def test_embeddings_and_hidden_size_are_known_in_all_that_run() -> None:
    assert PAGE.count("embeddings") == PAGE.count("runs")


def test_a_model_with_shared_keys_is_on_the_page() -> None:
    sharing = specimen("gemma4_text+shared_keys")
    assert sharing.model.config.num_kv_shared_layers == 2
    assert PAGE.says("gemma4_text+shared_keys", "resume")
