"""Beside what is not installed for development, in processes of its own, where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


def ran(root: Path, *script: str, processes: int = 1) -> None:
    many = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *(many if processes > 1 else []), *script]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]


def found(path: Path, at_least: int) -> None:
    told = json.loads(path.read_text())
    assert len(told) >= at_least and all(told.values()), told


@pytest.mark.skipif(
    not (find_spec("liger_kernel") and find_spec("triton")),
    reason="needs Liger: pip install liger-kernel triton",
)
def test_beside_ligers_kernels_loss_and_gradient_are_those_without(
    root: Path, tmp_path: Path
) -> None:
    ran(root, "tests.gradients.beside_liger", str(tmp_path))
    found(tmp_path / "liger.json", 18)


@pytest.mark.skipif(
    not find_spec("deepspeed"), reason="needs DeepSpeed: DS_BUILD_OPS=0 pip install deepspeed"
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_under_deepspeed_two_processes_train_as_one(root: Path, tmp_path: Path, stage: int) -> None:
    ran(root, "tests.gradients.beside_deepspeed", str(tmp_path), str(stage), processes=2)
    for rank in range(2):
        found(tmp_path / f"stage{stage}-rank{rank}.json", 15)
