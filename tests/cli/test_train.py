"""`pliant train` names what it trains; without a name, it is a language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pliant.cli import app

SHORT = ["--set", "max_steps=1", "--set", "use_cpu=true", "--rows", "4", "--json"]


def trained(capsys: Any, *arguments: str) -> dict[str, Any]:
    assert app.outcome(["train", *arguments, *SHORT]) == 0
    result = json.loads(capsys.readouterr().out)
    return {k: v for k, v in result.items() if k not in ("out", "seconds")}


def test_bare_train_is_train_lm(tmp_path: Path, capsys: Any) -> None:
    common = ["--model", "nano-s", "--data", "nano", "--out"]
    bare = trained(capsys, *common, str(tmp_path / "bare"))
    assert bare == trained(capsys, "lm", *common, str(tmp_path / "lm"))
    assert bare["engine"] == "standard"  # one step is too short for a race


def test_a_scorer_is_trained_by_the_seeds_settings(tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "labels.jsonl"
    rows = [{"prompt": f"{n} + {n}", "label": n % 2} for n in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", str(data), "--num-epochs", "1", "--device", "cpu"]
    out = tmp_path / "out"
    assert app.outcome(["train", "scorer", *options, "--output-dir", str(out)]) == 0
    assert f"saved in {out}" in capsys.readouterr().out
    assert json.loads((out / "pliant-train.json").read_text())["plan"]["model"] == "nano-s"
