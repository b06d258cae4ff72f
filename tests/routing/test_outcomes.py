"""The label table: read as it was written, or refused with the row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from pliant.data import write_rows
from pliant.errors import InvalidInput
from pliant.routing import Outcomes
from pliant.routing.scorers.linear import joined

FLAT = [
    {"prompt": "a?", "group": "x", "weak": True, "strong": True},
    {"prompt": "b?", "group": "y", "weak": False, "strong": True},
    {"prompt": "c?", "group": "y", "weak": False, "strong": False},
]


def table(n: int = 40, groups: int = 4) -> Outcomes:
    rng = np.random.default_rng(0)
    return Outcomes(
        prompts=tuple(f"prompt {i}" for i in range(n)),
        models=("small", "middle", "large"),
        right=rng.integers(0, 5, (n, 3)) / 4,
        cost=rng.uniform(1, 2, (n, 3)) * [1, 2, 5],
        groups=tuple(f"g{i % groups}" for i in range(n)),
        wordings=tuple(f"w{i % 3}" for i in range(n)),
        unit="usd",
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    before = table()
    before.write(tmp_path / name)
    after = Outcomes.read(tmp_path / name)
    for field in ("prompts", "models", "groups", "wordings", "unit"):
        assert getattr(after, field) == getattr(before, field)
    assert (after.right == before.right).all() and (after.cost == before.cost).all()


TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "row",
    [{"prompt": TALK}, {"prompt": "system: Be brief.\nuser: hello", "messages": TALK}],
    ids=["in its column", "as labels have it"],
)
def test_a_conversation_stays_one(tmp_path: Path, row: dict[str, object]) -> None:
    right = {"right": {"a": 1, "b": 0}}
    write_rows(tmp_path / "a.jsonl", [row | right, {"prompt": "hi"} | right])
    outcomes = Outcomes.read(tmp_path / "a.jsonl")
    for _ in range(2):
        assert outcomes.prompts == ("system: Be brief.\nuser: hello", "hi")
        assert list(outcomes.asked) == [TALK, "hi"]
        assert list(outcomes.select([1, 0]).asked) == ["hi", TALK]
        assert list(joined((outcomes.select([1]), outcomes)).asked) == ["hi", TALK, "hi"]
        outcomes.write(tmp_path / "b.jsonl")
        outcomes = Outcomes.read(tmp_path / "b.jsonl")
    assert outcomes.select([1]).asked == ("hi",)


def test_messages_that_say_something_else_are_a_column_like_any(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "messages": TALK, "right": {"a": 1, "b": 0}}]
    write_rows(tmp_path / "a.jsonl", rows)
    assert Outcomes.read(tmp_path / "a.jsonl").asked == ("hi",)


def test_flat_columns_as_the_public_label_sets_have_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, FLAT)).encode()))
    outcomes = Outcomes.read(path, models=("weak", "strong"))
    assert outcomes.right.tolist() == [[1, 1], [0, 1], [0, 0]]
    assert outcomes.gain.tolist() == [0, 1, 0]
    assert (outcomes.weak.tolist(), outcomes.strong.tolist()) == ([1, 0, 0], [1, 1, 0])
    assert outcomes.cost.tolist() == [[0, 1]] * 3 and outcomes.unit == "calls"
    assert outcomes.groups == ("x", "y", "y") and outcomes.wordings is None
    write_rows(tmp_path / "a.csv", FLAT)  # there True is text
    from_csv = Outcomes.read(tmp_path / "a.csv", models=("weak", "strong"))
    assert (from_csv.right == outcomes.right).all()


def test_models_come_in_the_order_of_their_cost_or_as_they_are_named(tmp_path: Path) -> None:
    table().of_models(["large", "small"]).write(tmp_path / "a.jsonl")
    assert Outcomes.read(tmp_path / "a.jsonl").models == ("small", "large")
    named = Outcomes.read(tmp_path / "a.jsonl", models=["large", "small"])
    assert named.models == ("large", "small")
    assert (named.gain == -Outcomes.read(tmp_path / "a.jsonl").gain).all()


@pytest.mark.parametrize("column", ["right", "results", None])
def test_grades_may_be_objects(tmp_path: Path, column: str | None) -> None:
    """{model: {correct: ..., cost: ...}}, in a column of any name or a column a model."""
    grades = {"dear": {"correct": True, "cost": 3}, "cheap": {"correct": 0.5, "cost": "0.5"}}
    rows = [{"q": f"prompt {i}", **(grades if column is None else {column: grades})} for i in "ab"]
    write_rows(tmp_path / "a.jsonl", rows)
    named = {} if column is None else {"right": column}
    read = Outcomes.read(tmp_path / "a.jsonl", prompt="q", unit="usd", **named)
    assert read.models == ("cheap", "dear") and read.unit == "usd"
    assert read.right.tolist() == [[0.5, 1.0]] * 2 and read.cost.tolist() == [[0.5, 3.0]] * 2
    rows[1] = {"q": "?", **(rows[0] | {"dear": {"wrong": 1}} if column is None else {column: {}})}
    write_rows(tmp_path / "b.jsonl", rows)
    fault = "row 2: no number under" if column is None else "row 2: holds no grade of any model"
    with pytest.raises(InvalidInput, match=fault):
        Outcomes.read(tmp_path / "b.jsonl", prompt="q", **named)


def test_costs_by_model(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", FLAT)
    read = Outcomes.read(
        tmp_path / "a.jsonl",
        models=("weak", "strong"),
        cost={"weak": 0.1, "strong": 3},
        unit="usd",
    )
    assert read.cost.tolist() == [[0.1, 3]] * 3 and read.unit == "usd"


@pytest.mark.parametrize(
    ("rows", "how", "expected"),
    [
        (FLAT, {}, "say which columns are the models"),
        (FLAT, {"models": ("weak", "storng")}, "did you mean 'strong'"),
        (FLAT, {"models": ("weak",)}, "1 models"),
        (FLAT, {"models": ("weak", "weak")}, "appears twice"),
        (FLAT, {"models": ("weak", "group")}, "row 1: no number under 'group'"),
        (FLAT, {"models": ("weak", "strong"), "prompt": "text"}, "no column 'text'"),
        (FLAT, {"models": ("weak", "strong"), "unit": "euro"}, "unit='euro'"),
        (FLAT, {"models": ("weak", "strong"), "cost": {"weak": 1}}, "no model 'strong'"),
        (
            [*FLAT, {"prompt": "d?", "weak": 1, "strong": 1}],
            {"models": ("weak", "strong")},
            "row 4: no 'group'",
        ),
        ([{"prompt": "?", "right": {"a": 1, "b": 2}}], {}, r"must lie in \[0, 1\]"),
        ([{"prompt": "?", "right": {"a": 1, "b": 1}}], {"group": "grup"}, "no column 'grup'"),
        ([{"prompt": "?", "right": 0.5}], {}, "row 1: no numbers by model under 'right'"),
        ([{"prompt": "?", "right": {"a": 10**400, "b": 1}}], {}, "no number under 'right.a'"),
        ([{"prompt": None, "right": {"a": 1, "b": 1}}], {}, "row 1: a prompt is a text or a list"),
        ([{"prompt": [1], "right": {"a": 1, "b": 1}}], {}, "row 1: message 0 of a prompt is 1"),
        ([{"prompt": "?", "right": {"a": 1, "b": None}}], {}, "b was never asked: no row holds"),
        ([{"prompt": "?", "right": {"a": 1, "b": "?"}}], {}, "row 1: no number under 'right.b'"),
        (
            [{"prompt": "?", "right": {"a": 1}}, {"prompt": "!", "right": {"b": 1}}],
            {},
            r"no prompt was asked of every model.*of 2 prompts: a 1, b 1",
        ),
        (
            [
                {"prompt": "?", "right": {"a": 1, "b": 0}, "cost": {"a": 1, "b": 2}},
                {"prompt": "!", "right": {"a": 1, "b": 0}, "cost": {"a": 1}},
            ],
            {},
            "row 2: no number under 'cost.b'",
        ),
        ([{"prompt": "?", "right": {"a": 1, "b": 0, "c": 0}}], {}, "need costs"),
        (
            [
                {"prompt": "?", "right": {"a": 1, "b": 0}, "unit": "ms"},
                {"prompt": "!", "right": {"a": 1, "b": 0}, "unit": "usd"},
            ],
            {},
            "several units",
        ),
        (
            [{"prompt": "?", "right": {"a": 1, "b": 0}, "cost": {"a": 1, "b": -1}}],
            {},
            "0 or more",
        ),
    ],
)
def test_a_table_that_is_none_is_refused(
    tmp_path: Path, rows: list[dict[str, object]], how: dict[str, object], expected: str
) -> None:
    write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(InvalidInput, match=expected):
        Outcomes.read(tmp_path / "a.jsonl", **how)  # type: ignore[arg-type]


PARTIAL = [
    {"prompt": "a?", "right": {"small": 1}, "cost": {"small": 2}},
    {"prompt": "b?", "right": {"small": 1, "large": 0.5}, "cost": {"small": 1, "large": 4}},
    {"prompt": "c?", "right": {"small": None, "large": 1}, "cost": {"small": 9, "large": 8}},
    {"prompt": "d?", "right": {"small": 0, "large": 0.5}, "cost": {"small": 1, "large": 4}},
]


def test_a_model_need_not_be_asked_every_prompt(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", PARTIAL)
    outcomes = Outcomes.read(tmp_path / "a.jsonl")
    for _ in range(2):
        assert outcomes.models == ("small", "large")
        assert outcomes.complete.tolist() == [False, True, False, True]
        assert outcomes.answers.tolist() == [3, 3]
        assert np.isnan(outcomes.right[0, 1]) and np.isnan(outcomes.cost[2, 0])
        outcomes.write(tmp_path / "b.jsonl")
        assert "NaN" not in (tmp_path / "b.jsonl").read_text()
        outcomes = Outcomes.read(tmp_path / "b.jsonl")


def test_empty_cells_of_a_csv_are_grades_that_are_missing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,weak,strong\na?,1,\nb?,0,1\nc?,1,0\n")
    outcomes = Outcomes.read(tmp_path / "a.csv", models=("weak", "strong"))
    assert outcomes.complete.tolist() == [False, True, True]


def test_rows_of_other_models_alone_are_no_labels(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "a": 1, "b": 0, "c": 1} for i in range(3)]
    write_rows(tmp_path / "a.jsonl", [*rows, {"prompt": "only c?", "c": 1}])
    assert len(Outcomes.read(tmp_path / "a.jsonl", models=("a", "b"))) == 3


def test_models_are_compared_on_the_prompts_that_all_were_asked() -> None:
    """The large model was asked the hard prompts alone; small answers the easy ones, too."""
    right = np.array([[1, np.nan]] * 30 + [[0, 0], [0, 1], [1, 1], [0, 0]])
    cost = np.array([[1, np.nan]] * 30 + [[3, 30]] * 4)
    outcomes = Outcomes(tuple(map(str, range(34))), ("small", "large"), right, cost)
    assert outcomes.mean_right.tolist() == [0.25, 0.5] and outcomes.mean_cost.tolist() == [3, 30]
    assert outcomes.by_quality().models == ("small", "large") and outcomes.best == 1
    assert outcomes.of_models(["large", "small"]).by_cost().models == ("small", "large")
    with pytest.raises(InvalidInput, match="not every model was asked 30 of these 34"):
        outcomes.refuse_incomplete("apgr")
    outcomes.shared().refuse_incomplete("apgr")


def test_sizes_must_agree() -> None:
    with pytest.raises(InvalidInput, match=r"right is \(2, 1\), for 2 prompts and 2 models"):
        Outcomes(("a", "b"), ("s", "l"), np.zeros((2, 1)), np.zeros((2, 2)))
    with pytest.raises(InvalidInput, match="1 groups for 2 prompts"):
        Outcomes(("a", "b"), ("s", "l"), np.zeros((2, 2)), np.zeros((2, 2)), groups=("x",))
    with pytest.raises(InvalidInput, match="0 prompts"):
        Outcomes((), ("s", "l"), np.zeros((0, 2)), np.zeros((0, 2)))


def test_take_by_index_and_by_mask() -> None:
    outcomes = table()
    some = outcomes.select([3, 1])
    assert some.prompts == ("prompt 3", "prompt 1") and some.groups == ("g3", "g1")
    assert (some.right == outcomes.right[[3, 1]]).all()
    masked = outcomes.select(np.array(outcomes.groups) == "g2")
    assert set(masked.groups or ()) == {"g2"} and len(masked) == 10


def test_splits_part_the_table() -> None:
    outcomes = table()
    a, b = outcomes.split((0.5, 0.25), seed=1)
    assert (len(a), len(b)) == (20, 10) and not set(a.prompts) & set(b.prompts)
    assert outcomes.split((0.5, 0.25), seed=1)[0].prompts == a.prompts
    for by, name in (("group", "groups"), ("wording", "wordings")):
        a, b = outcomes.split((0.5, 0.5), seed=0, by=by)
        assert not set(getattr(a, name)) & set(getattr(b, name)) and len(a) + len(b) == 40


def test_prompts_of_one_text_are_not_parted() -> None:
    prompts = tuple(f"Prompt {i // 2}" if i % 2 else f"prompt  {i // 2}" for i in range(40))
    outcomes = Outcomes(prompts, ("s", "l"), np.zeros((40, 2)), np.zeros((40, 2)))
    for seed in range(5):
        a, b = outcomes.split((0.5, 0.5), seed)
        assert not {p.lower().split()[1] for p in a.prompts} & {
            p.lower().split()[1] for p in b.prompts
        }


def test_a_split_that_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidInput, match="too few: 2 splits"):
        table(groups=1).split((0.5, 0.5), 0, by="group")
    with pytest.raises(InvalidInput, match='"group", "wording" or None'):
        table().split((0.5, 0.5), 0, by="subject")
    bare = Outcomes(("a", "b"), ("s", "l"), np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(InvalidInput, match="have no groups"):
        bare.split((0.5, 0.5), 0, by="group")
