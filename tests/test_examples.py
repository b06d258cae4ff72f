"""Every example runs as its page says, and what it prints is there."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PRINTED = {
    "score_prompts": ["nano-l", "P(hard) 0.500  What is 2 + 2?", "answers: ('4',"],
    "smaller_model": ["perplexity", "96 channels pruned, compensated", "96 channels, a vocabulary"],
    "specialist": ["step 19", "an expert of nano-s: 432 parameters", "sums-model: a stock Llama"],
    "train_selected_tokens": ["step 20, 70 of 280 tokens in the last batch"],
}


def test_each_is_listed() -> None:
    files = {path.stem for path in EXAMPLES.glob("*.py")}
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert files == PRINTED.keys()
    assert all(f"`python examples/{name}.py`" in page for name in files)


@pytest.mark.parametrize("name", PRINTED)
def test_it_runs(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]([])
    printed = capsys.readouterr().out
    assert [part for part in PRINTED[name] if part not in printed] == [], printed
    assert not list(tmp_path.iterdir())  # so it runs a second time


@pytest.mark.parametrize("name", ["smaller_model", "specialist"])
def test_a_model_and_a_folder_are_arguments(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    main(["nano-s"])
    assert not list(tmp_path.iterdir())
    main(["nano-s", "new"])
    assert list((tmp_path / "new").rglob("config.json"))
