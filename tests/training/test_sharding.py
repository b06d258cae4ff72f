"""Under accelerate's FSDP2, Trainers train what they train in one piece."""

from __future__ import annotations

import json
from pathlib import Path

from tests.processes import run_two


def test_two_processes_train_shards_as_accelerate_makes_them(tmp_path: Path, root: Path) -> None:
    run_two("tests.training.two_processes_sharded", str(tmp_path), cwd=root)
    first, second = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2))
    assert first == second and all(first.values()), first
