"""Two processes train one expert, whole in each and sharded by FSDP2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_two_processes_train_one_expert(tmp_path: Path, root: Path) -> None:
    script = ["-m", "tests.experts.training.two_processes", str(tmp_path)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launch, *script], cwd=root, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2))
    assert first == second and all(first.values()), first
