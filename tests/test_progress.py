"""Which steps print a line in a pipe, and what it says of the time."""

from __future__ import annotations

import pytest

from pliant.progress import Pace, duration


@pytest.mark.parametrize("total", [1, 2, 7, 10, 999, 100_000])
def test_long_work_prints_at_most_a_dozen_lines_and_the_last(total: int) -> None:
    pace = Pace(total)
    due = [done for done in range(1, total + 1) if pace.due(done)]
    assert due[0] == 1 and due[-1] == total and len(due) <= 11


def test_the_time_left_is_that_of_the_steps_so_far() -> None:
    now = 0.0
    pace = Pace(100, begun=20, clock=lambda: now)
    assert pace.left(20) == ""
    now = 60.0
    assert pace.left(40) == ", about 3 min left"
    assert pace.left(100) == ", took 60 s"


def test_durations_have_the_unit_that_one_would_use() -> None:
    assert [duration(s) for s in (0.2, 99, 100, 3600, 12_000)] == [
        "0 s",
        "99 s",
        "2 min",
        "60 min",
        "3 h 20 min",
    ]
