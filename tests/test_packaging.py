"""The wheel holds everything, and make installs once: in a fresh clone, a moved, a broken one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pliant import __version__, loading

NEEDED = ("src", "pyproject.toml", "README.md", "LICENSE")


def sh(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
        | environment,
    )


@pytest.fixture(scope="module")
def installed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree and unpacked where pip puts it."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("*.egg-info", "__pycache__", "build")
    for name in NEEDED:
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / "tree" / name, ignore=ignore)
        else:
            shutil.copy(root / name, folder / "tree" / name)
    pip = (sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check")
    tree = folder / "tree"
    built = sh(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, tree, cwd=folder)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    done = sh(*pip, "install", "--no-deps", "--target", folder / "site", wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_the_wheel_runs_by_itself(installed: Path) -> None:
    program = "import pliant; print(pliant.__file__); from pliant.cli import main; main()"
    done = sh(sys.executable, "-c", program, "--version", cwd=installed, PYTHONPATH=str(installed))
    assert done.stdout.split() == [f"{installed}/pliant/__init__.py", "pliant", __version__]


def test_the_wheel_holds_every_file_of_the_package(installed: Path, root: Path) -> None:
    source = root / "src" / "pliant"
    ours = {
        path.relative_to(source)
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    theirs = {path.relative_to(installed / "pliant") for path in installed.rglob("pliant/**/*")}
    assert ours - theirs == set()


def test_the_wheel_says_how_it_may_be_used(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    assert "License-Expression: Apache-2.0" in (info / "METADATA").read_text()
    assert (info / "licenses" / "LICENSE").is_file()


def test_the_embedded_models_are_small_enough_to_ship() -> None:
    octets = sum(f.stat().st_size for f in loading.WEIGHTS.rglob("*") if f.is_file())
    assert octets <= 8_000_000


def test_every_pin_is_bare_and_every_dependency_is_pinned(root: Path) -> None:
    pins = (root / "constraints.txt").read_text().splitlines()
    assert pins == sorted(pins, key=lambda pin: pin.split("=="))
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", pin) for pin in pins)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    names = {re.split(r"[\[<>=]", line)[0].lower() for line in wanted}
    pinned = {pin.partition("==")[0] for pin in pins}
    assert {name.replace("_", "-") for name in names} <= pinned


# --- make ----------------------------------------------------------------------------------------

# A project that needs nothing from an index, so that the real make, venv and pip can be tried.
BACKEND = """
import zipfile

METADATA = "Metadata-Version: 2.1\\nName: toy\\nVersion: 1\\n"

def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "toy-1-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.writestr("toy-1.dist-info/METADATA", METADATA)
        wheel.writestr("toy-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\n")
        wheel.writestr("toy-1.dist-info/RECORD", "")
    return name

build_wheel = build_editable
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "toy"
version = "1"
optional-dependencies = { dev = [] }
"""
STAMP = ".venv/.installed"


@pytest.fixture
def clone(root: Path, tmp_path: Path) -> Path:
    clone = tmp_path / "a clone"
    clone.mkdir()
    shutil.copy(root / "Makefile", clone)
    (clone / "pyproject.toml").write_text(PYPROJECT)
    (clone / "backend.py").write_text(BACKEND)
    (clone / "constraints.txt").write_text("")
    return clone


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return sh("make", f"PYTHON={sys.executable}", *words, cwd=folder)


def test_make_installs_once_and_again_only_for_a_reason(clone: Path, tmp_path: Path) -> None:
    first = make(clone, STAMP)
    assert first.returncode == 0, first.stderr
    assert "making .venv" in first.stdout
    assert "up to date" in make(clone, STAMP).stdout

    (clone / "constraints.txt").write_text("six==1.16.0\n")
    os.utime(clone / STAMP, (0, 0))
    again = make(clone, STAMP)
    assert "installing" in again.stdout and "making" not in again.stdout

    moved = clone.rename(tmp_path / "moved")
    assert "installing" in make(moved, STAMP).stdout
    assert "up to date" in make(moved, STAMP).stdout

    for interpreter in (moved / ".venv" / "bin").glob("python*"):
        interpreter.unlink()
    assert "making .venv" in make(moved, STAMP).stdout
    assert "up to date" in make(moved, STAMP).stdout


def test_make_says_which_python_it_needs(clone: Path) -> None:
    done = sh("make", "PYTHON=false", "test", cwd=clone)
    assert done.returncode != 0
    assert "needs Python 3.11 or later" in done.stderr
    assert not (clone / ".venv").exists()


def test_make_alone_lists_every_target(root: Path) -> None:
    targets = re.findall(r"^\.PHONY: (\S+)$", (root / "Makefile").read_text(), flags=re.MULTILINE)
    text = sh("make", cwd=root).stdout
    assert len(targets) >= 8
    for target in targets:
        assert f"make {target} " in text
