"""`pliant export`: from a model and its saved gates to a smaller stock model, or to one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.structure.pruning.test_prune import text
from transformers import AutoModelForCausalLM, AutoTokenizer

from pliant.cli.app import outcome
from pliant.loading import load_model
from pliant.structure import GateConfig, PruneConfig, attach, prune


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "pruned"
    prune(load_model("nano-s"), text(), PruneConfig(channels=0.25)).save(folder)
    return folder


@pytest.mark.parametrize("streamed", [False, True])
def test_a_smaller_stock_model_comes_out(
    streamed: bool, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "smaller"
    command = ["export", "nano-s", "--adapters", str(pruned), "--out", str(out), "--json"]
    command += ["--shard-size", "100KB", *(["--stream"] if streamed else [])]
    assert outcome(command) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    again = AutoModelForCausalLM.from_pretrained(out)
    assert report["streamed"] == streamed
    assert report["parameters"] == sum(p.numel() for p in again.parameters())
    assert report["parameters"] < report["parameters_before"]
    assert report["difference"] <= report["bound"]
    assert len(list(out.glob("*.safetensors"))) > 1
    assert AutoTokenizer.from_pretrained(out)("what is 1+1?")["input_ids"]
    assert "comparing" in captured.err and "Some parameters" not in captured.err


def test_gates_of_two_folders_come_together(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model("nano-s")
    layers = attach(model, GateConfig(("layers",)))
    layers["layers", 1].data.zero_()
    layers.save_pretrained(tmp_path / "layers")
    folders = ["--adapters", str(pruned), "--adapters", str(tmp_path / "layers")]
    assert outcome(["export", "nano-s", *folders, "--out", str(tmp_path / "smaller")]) == 0
    assert "1 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-model", "--out", "OUT"], "give --adapters"),
        (["no-such-model", "--adapters", "PRUNED"], "give --out"),
        (["nano-s", "--adapters", "nowhere", "--out", "OUT"], "--adapters nowhere: no such folder"),
        (["nano-s", "--adapters", "EMPTY", "--out", "OUT"], "holds no saved adapter"),
        (["nano-s", "--adapters", "PRUNED", "--out", "EMPTY/../pruned"], "name a new folder"),
        (["nano-l", "--adapters", "PRUNED", "--out", "OUT"], "another base"),
        (["nano-l", "--adapters", "PRUNED", "--out", "OUT", "--stream"], "another base"),
        (["EMPTY", "--adapters", "PRUNED", "--out", "OUT", "--stream"], "is no model"),
        (["nano-s", "--adapters", "PRUNED", "--out", "OUT", "--shard-size", "big"], "'big'"),
        (["nano-s", "--adapters", "PRUNED", "--out", "OUT", "--dtype", "f33"], "f33"),
        (["nano-s", "--adapters", "PRUNED", "--out", "OUT", "--device", "moon"], "moon"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    words: str,
    pruned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pruned").symlink_to(pruned)
    places = {"OUT": "out", "PRUNED": "pruned", "EMPTY": "empty"}
    for name, place in places.items():
        arguments = [each.replace(name, str(tmp_path / place)) for each in arguments]
    before = sorted(tmp_path.iterdir())
    assert outcome(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") <= 2 and "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before
