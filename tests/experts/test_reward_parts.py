"""The line that names a part of a reward: what it means, and that anything else is one error."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pliant.errors import InvalidInput
from pliant.experts.reward_parts import RewardPart, parse_part
from pliant.verify import Choice, Contains, Exact, Judge, Numeric, Regex, RewardModel, UnitTests


@pytest.mark.parametrize(
    ("line", "measure", "weight"),
    [
        ("numeric", Numeric(), 1.0),
        (" exact=0.5\n", Exact(), 0.5),
        ("contains=-2e-1", Contains(), -0.2),
        ("numeric:tolerance=0.1,take=first", Numeric(tolerance=0.1, take="first"), 1.0),
        ("numeric=2:relative=0.1", Numeric(relative=0.1), 2.0),
        ("exact:ignore-case=true", Exact(ignore_case=True), 1.0),
        (r"regex:pattern=#### (.+)=\d{1,2}:x", Regex(pattern=r"#### (.+)=\d{1,2}:x"), 1.0),
        ("regex=0.1:pattern=<b>,match_only=yes", Regex(pattern="<b>", match_only=True), 0.1),
        ("choice:letters=ABCD", Choice("ABCD"), 1.0),
        ("unit_tests:seconds=3,partial=true", UnitTests(seconds=3, partial=True), 1.0),
        ("reward_model:model=a/b,raw=true", RewardModel("a/b", raw=True), 1.0),
    ],
)
def test_a_line_is_a_verifier_with_options_and_a_weight(
    line: str, measure: object, weight: float
) -> None:
    part = parse_part(line)
    assert (part.measure, part.weight) == (measure, weight)


def test_a_line_is_a_function_of_a_file_or_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a=b:c"
    folder.mkdir()
    (folder / "mine.py").write_text("def brevity(answer):\n    return -len(answer)\n")
    part = parse_part(f"{folder}/mine.py:brevity=0.1")
    assert (part.value("four", None, None), part.weight) == (-4, 0.1)
    assert part.label == f"{folder}/mine.py:brevity"
    monkeypatch.chdir(folder)
    assert parse_part("mine.py:brevity").weight == 1.0
    assert parse_part("operator:eq=2").value("a", "a", None) is True


def test_a_judge_is_opened_by_the_model_that_the_line_names() -> None:
    opened: list[str] = []

    def open_judge(model: str) -> Callable[[str], str]:
        opened.append(model)
        return lambda text: re.findall(r"VERDICT \w+: RIGHT", text)[0]

    part = parse_part("judge=2:model=openai:m@http://host:1/v1,tries=3", open_judge)
    assert opened == ["openai:m@http://host:1/v1"]
    assert isinstance(part.measure, Judge) and part.measure.tries == 3
    assert part.value("4", "4", None) == 1.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no reward ''"),
        ("numerik", "did you mean 'numeric'"),
        ("numerik:tolerance=1", "did you mean 'numeric'"),
        ("regx:pattern=(", "did you mean 'regex'"),
        ("function", "no reward 'function'"),
        ("function:function=operator:eq", "no reward"),
        ("exact=half", "the weight 'half' is not a finite number"),
        ("exact=", "the weight '' is not a finite number"),
        ("exact=nan", "the weight 'nan' is not a finite number"),
        ("operator:eq=inf", "the weight 'inf' is not a finite number"),
        ("exact:0.5", "write it as KEY=VALUE"),
        ("exact:", "write it as KEY=VALUE"),
        ("numeric:tolerence=1", "did you mean 'tolerance'"),
        ("numeric:tolerance=much", "valid number"),
        ("numeric:take=best", "take='best'"),
        ("numeric:take=first,take=last", "take is given twice"),
        ("regex:pattern=(", "no valid pattern"),
        ("regex:pattern=a,b=c", "no option 'b'"),
        ("unit_tests:seconds=0", "give more than 0"),
        ("reward_model", "model"),
        ("judge", "a judge is a model"),
        ("judge:model=nano-l", "give open_judge"),
        ("judge:modell=nano-l", "did you mean 'model'"),
        ("no_such_module.a:f", "cannot be imported"),
        ("nowhere.py:f", "there is no such file"),
        ("operator:equals", "no function 'equals'"),
        ("operator:eq:eq", "no reward"),
    ],
)
def test_a_wrong_line_is_one_clear_error(line: str, message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        parse_part(line)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(", "cannot be imported"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("raise SystemExit(0)", "cannot be imported"),
        ("f = 3", "no function 'f'"),
        ("def f(a, b, c, d): pass", "cannot be called with an answer"),
    ],
)
def test_a_file_that_is_no_reward_is_one_clear_error(
    tmp_path: Path, source: str, message: str
) -> None:
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(InvalidInput) as error:
        parse_part(f"{tmp_path}/mine.py:f")
    assert message in str(error.value)


WORDS = ["numeric", "exact", "regex", "judge", "reward_model", "unit_tests", "function", "x"]
WORDS += ["=", ":", ",", ".py", "/", "pattern", "tolerance", "model", "(", "1", "-", " ", "\n", "é"]


@given(st.lists(st.sampled_from(WORDS), max_size=10).map("".join) | st.text(max_size=20))
def test_any_text_is_a_part_or_refused(line: str) -> None:
    try:
        part = parse_part(line)
    except InvalidInput:
        return
    assert isinstance(part, RewardPart) and math.isfinite(part.weight)


@given(st.floats(allow_nan=False, allow_infinity=False), st.text(alphabet="ab=:.,#^$ {1}"))
def test_weights_and_patterns_are_read_as_they_are_written(weight: float, pattern: str) -> None:
    try:
        measure = Regex(pattern=pattern.strip())
    except InvalidInput:
        return
    if re.search(r",[A-Za-z_]+=", pattern):  # another option begins
        return
    part = parse_part(f"regex={weight!r}:pattern={pattern}")
    assert (part.weight, part.measure) == (weight, measure)


@pytest.mark.parametrize("weight", ["1", None, math.nan, math.inf, True])
def test_a_weight_is_a_finite_number(weight: object) -> None:
    with pytest.raises(InvalidInput, match="weight"):
        RewardPart(Exact(), weight)  # type: ignore[arg-type]


def test_a_part_is_callable() -> None:
    with pytest.raises(InvalidInput, match="no verifier and no function"):
        RewardPart(3)  # type: ignore[arg-type]
