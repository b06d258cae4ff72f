"""router.json is strict: whatever is wrong in it is named, an unknown key with the nearest one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.routing.minimal_scorer import content

from pliant.errors import CorruptFile, InvalidInput, PliantError
from pliant.routing.backends import Settings
from pliant.routing.live_settings import SettingsBand
from pliant.routing.router_file import make, read

FULL = content(
    calibration={"nano-s": {"kind": "temperature", "temperature": 2.0}},
    drift={"edges": [0.1, 0.5], "below": [0.2, 0.9], "n": 100},
    settings=[{"up_to": 0.5, "max_new_tokens": 9}, {"up_to": 1.0}],
    label_cost={"nano-s": {"calls": 3, "flops": 1e6}},
)


def broken(folder: Path, *steps: Any, value: Any) -> str:
    """The error for a file in which the value at a place is another one."""
    make(**FULL).write(folder)
    path = folder / "router.json"
    changed = json.loads(path.read_text())
    place = changed
    for step in steps[:-1]:
        place = place[step]
    place[steps[-1]] = value
    path.write_text(json.dumps(changed))
    with pytest.raises(PliantError) as error:
        read(folder)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = make(**FULL)
    assert file.write(tmp_path) == tmp_path / "router.json"
    assert read(tmp_path) == file
    assert [path.name for path in tmp_path.iterdir()] == ["router.json"]


def test_the_older_name_of_novel_is_read(tmp_path: Path) -> None:
    make(**FULL).write(tmp_path)
    path = tmp_path / "router.json"
    older = json.loads(path.read_text())
    assert older.pop("novel") == "default"
    path.write_text(json.dumps({**older, "far": "ignore"}))
    file = read(tmp_path)
    assert file.novel == "ignore" and file.rule.novel_to is None
    file.write(tmp_path)
    assert json.loads(path.read_text())["novel"] == "ignore"
    assert "'far'" in broken(tmp_path, "far", value="ignore"), "both names are one too many"


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), 0.25, -1.0])
def test_every_threshold_can_be_written(value: float, tmp_path: Path) -> None:
    make(**content(threshold={"value": value, "sentence": "s"})).write(tmp_path)
    assert read(tmp_path).threshold.limit == value


@pytest.mark.parametrize(
    ("place", "near"),
    [
        (("defualt",), "did you mean 'default'"),
        (("models", 0, "bakcend"), "did you mean 'backend'"),
        (("scorer", "kinds"), "did you mean 'kind'"),
        (("threshold", "sentense"), "did you mean 'sentence'"),
        (("drift", "windows"), "did you mean 'window'"),
        (("settings", 1, "upto"), "did you mean 'up_to'"),
        (("ledger", "prompt"), "did you mean 'prompts'"),
        (("sticky", "policies"), "did you mean 'policy'"),
        (("models", 1, "zzz"), "there are name, backend"),
    ],
)
def test_an_unknown_key_names_the_nearest(place: Any, near: str, tmp_path: Path) -> None:
    message = broken(tmp_path, *place, value=1)
    assert f"no key {place[-1]!r}" in message and near in message


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        (("default",), "nano-x", "did you mean"),
        (("default",), 3, "default"),
        (("unit",), "dollars", "unit"),
        (("models",), [], "models"),
        (("models", 1, "name"), "nano-s", "two models are called 'nano-s'"),
        (("models", 0, "cost"), -1, "models.0.cost"),
        (("models", 0, "cost"), "1", "models.0.cost"),
        (("models", 0, "context"), 0, "models.0.context"),
        (("models", 0, "backend"), "openai:m", "openai:MODEL@"),
        (("models", 0, "backend"), "openai:m@https://u:p@h/v1", "environment variable"),
        (("scorer", "folder"), "../../elsewhere", "must be a folder beside"),
        (("scorer", "folder"), "/etc", "must be a folder beside"),
        (("threshold", "value"), "high", "threshold.value"),
        (("threshold", "on"), "score", "threshold.on"),
        (("far",), "strong", "far"),
        (("calibration", "nano-x"), {}, "calibration: no model 'nano-x'"),
        (("calibration",), {"nano-s": {"kind": "plat"}}, "router.json: calibration of nano-s"),
        (("drift", "below"), [0.9, 0.2], "ascending"),
        (("drift", "edges"), [0.1], "one length"),
        (("drift", "false_alarms"), 0, "false_alarms"),
        (("settings", 0, "up_to"), 1.0, "must ascend to 1"),
        (("settings", 1, "up_to"), 0.9, "must ascend to 1"),
        (("settings", 0, "samples"), 0, "samples"),
        (("settings", 0, "temperature"), -1, "temperature"),
        (("settings", 0), {"up_to": 0.5, "samples": 2, "temperature": 0}, "temperature 0"),
        (("sticky", "ttl"), 0, "ttl"),
        (("version",), 2, "pip install -U pliant"),
        (("version",), "1", "has no version"),
    ],
)
def test_a_wrong_value_is_named(place: Any, value: Any, expected: str, tmp_path: Path) -> None:
    assert expected in broken(tmp_path, *place, value=value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"unit": "calls"}', "\xff"])
def test_what_is_no_router_is_said_to_be_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "router.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptFile):
        read(tmp_path)


def test_an_empty_folder_is_no_router(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"holds no router\.json"):
        read(tmp_path)


def test_a_gain_threshold_is_for_two_models() -> None:
    third = {"name": "c", "backend": "c=nano-s", "cost": 9.0}
    with pytest.raises(InvalidInput, match="for two models, not 3"):
        make(**content(models=[*content()["models"], third]))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(key=st.sampled_from(sorted(FULL)), value=json_like)
def test_any_value_is_taken_or_refused_in_our_own_words(key: str, value: Any) -> None:
    try:
        make(**{**FULL, key: value})
    except InvalidInput as error:
        assert str(error).startswith("router: ")


def test_a_band_says_only_what_it_has_an_opinion_on() -> None:
    before = Settings(max_new_tokens=7, temperature=0.5, samples=2, seed=3)
    assert SettingsBand(up_to=1.0).over(before) == before
    assert SettingsBand(up_to=1.0, max_new_tokens=9).over(before) == Settings(9, 0.5, 2, 3)
