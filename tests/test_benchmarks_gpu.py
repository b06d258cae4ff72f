"""The GPU benchmark, on a CPU at tiny sizes: every row runs, and a broken one costs only itself.

On a machine with a GPU, `pytest -m gpu` runs the checks at full size, without the timings.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import process
from benchmarks.gpu.process import run_row
from benchmarks.gpu.rows import Row, rows_of
from benchmarks.gpu.runner import Run

CHECKS = [row for row in rows_of() if row.is_check]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("gpu"), rows_of(dry=True), "cpu", isolated=False)
    with torch._dynamo.config.patch(recompile_limit=8):  # the rows raise it
        run.go()
    return run


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu.json").read_text(encoding="utf-8"))["rows"]


def test_every_row_gives_figures_without_an_error(dry_run: Run) -> None:
    rows = results(dry_run.folder)
    assert list(rows) == [row.name for row in rows_of()]
    assert {name: row["reason"] for name, row in rows.items() if "reason" in row} == {}
    figures = [figure for row in rows.values() for figure in row["figures"].values()]
    assert figures and not any("error" in figure for figure in figures)


def test_a_second_run_repeats_nothing(dry_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = results(dry_run.folder)
    Run(dry_run.folder, dry_run.rows, "cpu", isolated=False).go()
    assert results(dry_run.folder) == before
    assert f"0 of {len(dry_run.rows)} rows" in capsys.readouterr().out


def test_each_ratio_has_its_control_in_the_same_row(dry_run: Run) -> None:
    ratio = "times as fast as "
    for name, row in results(dry_run.folder).items():
        keys = {key for figures in row["figures"].values() for key in figures}
        for control in [key.removeprefix(ratio) for key in keys if key.startswith(ratio)]:
            assert any(f"{figure},".startswith(f"{control},") for figure in row["figures"]), name


def test_the_rows_of_a_real_model_come_only_with_its_folder(tmp_path: Path) -> None:
    without, rows = rows_of(), rows_of(model=tmp_path)
    added = [row for row in rows if row not in without]
    assert added and all(row.settings["folder"] == str(tmp_path) for row in added)
    assert len({row.name for row in rows}) == len(rows) == len(without) + len(added)


# --- rows that go wrong, each in a process of its own ---------------------------------------------

FIGURES = "import json, pathlib, sys; to = pathlib.Path(sys.argv[1]); sys.stdin.readline()"
WRITES = f"{FIGURES}; to.write_text(json.dumps({{'status': %r, 'figures': {{'a': {{}}}}}}))"
SCRIPTS = {
    "good": WRITES % "done",
    "hangs": WRITES % "running" + "; import time; time.sleep(60)",
    "crashes": WRITES % "running" + "; sys.exit('out of memory')",
    "good again": WRITES % "done",
}


def scripted(folder: Path, **options: Any) -> Run:
    limits = {name: 3 if name == "hangs" else 60 for name in SCRIPTS}
    rows = [Row(name, "engines.check", 0, limits[name], {"script": name}) for name in SCRIPTS]
    return Run(
        folder,
        rows,
        "cpu",
        command=lambda row, to: [sys.executable, "-c", SCRIPTS[row.name], str(to)],
        **options,
    )


def test_a_row_that_hangs_or_crashes_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "STARTUP", 0.0)
    run = scripted(tmp_path)
    run.go()
    rows = results(tmp_path)
    assert run.failures == ["hangs", "crashes"]
    assert rows["good"]["status"] == rows["good again"]["status"] == "done"
    assert "stopped after" in rows["hangs"]["reason"]
    assert rows["crashes"]["errors"] == ["out of memory"]
    assert rows["hangs"]["figures"] == rows["crashes"]["figures"] == {"a": {}}  # as they had come
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_rows_for_which_no_time_is_left_are_skipped_and_run_next_time(tmp_path: Path) -> None:
    run = scripted(tmp_path, minutes=-1)
    run.go()
    assert {row["status"] for row in results(tmp_path).values()} == {"skipped"}
    assert "were left" in results(tmp_path)["good"]["reason"]
    again = scripted(tmp_path)
    again.rows = [row for row in again.rows if row.name == "good"]
    again.go()
    assert results(tmp_path)["good"]["status"] == "done"


def test_other_settings_are_run_again(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    run = scripted(folder)
    run.rows = run.rows[:1]
    run.go()
    run.rows = [Row("good", "engines.check", 0, 60, {"script": "good", "batch": 2})]
    run.go()
    assert results(folder)["good"]["settings"]["batch"] == 2


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("row", CHECKS, ids=lambda row: row.name)
def test_on_a_gpu_it_computes_what_it_should(row: Row, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    outcome = run_row(row, "cuda", tmp_path / "row.json")
    assert outcome["status"] == "done", outcome
