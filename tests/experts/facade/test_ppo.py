"""The seed's `SVF_PPOTrainer` and its example on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.experts.training.runs import ROWS, config, model, tokenizer, z_of

from pliant.cli.expert import example
from pliant.errors import InvalidInput
from pliant.experts import __main__ as program
from pliant.experts.facade.ppo import SVF_PPOTrainer, contains_answer

PROMPTS, ANSWERS = [row["prompt"] for row in ROWS], [row["answer"] for row in ROWS]


def test_it_trains_z_on_prompts(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    def reward(prompt: str, answer: str, reference: str) -> float:
        seen.append((prompt, reference))
        return float(len(answer) > 3)

    own = config()
    ppo = SVF_PPOTrainer(
        model(),
        tokenizer(),
        own,
        output_dir=tmp_path / "outputs",
        logging_dir=tmp_path / "logs",
        say=lambda line: None,
    )
    result = ppo.train_on_prompts(PROMPTS, ANSWERS, reward, max_epochs=2)
    assert result.steps == 2 * 3 and set(seen) == set(zip(PROMPTS, ANSWERS, strict=True))
    trained = PeftModel.from_pretrained(model(), str(tmp_path / "outputs"))
    assert all(torch.isfinite(d).all() for d in z_of(trained).values())
    assert any(bool(d.any()) for d in z_of(trained).values())
    log = (tmp_path / "logs" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["step"] == 1


def test_the_seeds_reward_looks_for_the_answer() -> None:
    assert contains_answer("1+1", "it is 2", 2) == 1.0 != contains_answer("1+1", "it is 3", 2)


def test_a_learning_rate_that_moves_nothing_is_pointed_out() -> None:
    lines: list[str] = []
    SVF_PPOTrainer(model(), tokenizer(), learning_rate=1e-4, say=lines.append)
    assert "learning rate 0.0001: z starts at 1" in lines[0]
    SVF_PPOTrainer(model(), tokenizer(), say=lines.append)
    assert len(lines) == 1


def test_each_prompt_needs_an_answer() -> None:
    with pytest.raises(InvalidInput, match="12 prompts and 1 answers"):
        SVF_PPOTrainer(model(), tokenizer()).train_on_prompts(PROMPTS, ["1"])
    with pytest.raises(InvalidInput, match="the reward looks for the answers"):
        SVF_PPOTrainer(model(), tokenizer()).train_on_prompts(PROMPTS)


def test_the_configuration_counts_unless_an_argument_replaces_it() -> None:
    own = config(prompts=6)
    assert SVF_PPOTrainer(model(), tokenizer(), own).config == own
    assert SVF_PPOTrainer(model(), tokenizer(), own, batch_size=3).config.prompts == 3
    assert SVF_PPOTrainer(model(), tokenizer()).config.prompts == 4


def test_the_seeds_example_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "PROMPTS", 15)
    monkeypatch.chdir(tmp_path)
    flags = "--model_name nano-s --output_dir outputs --logging_dir logs --batch_size 4"
    program.main([*flags.split(), "--max_epochs", "1", "--learning_rate", "1e-4"])
    shown = capsys.readouterr()
    assert "3 steps on " in shown.out and "what is 58+67? before: " in shown.out
    assert "The model's own choice for this question: " in shown.out
    assert "z starts at 1" in shown.err
    assert (tmp_path / "outputs" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "logs" / "log.jsonl").is_file()


def test_a_file_is_no_folder_for_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("mine")
    with pytest.raises(InvalidInput, match="logs' is a file"):
        SVF_PPOTrainer(model(), tokenizer(), logging_dir=tmp_path / "logs")
    with pytest.raises(SystemExit, match="2"):
        program.main(["--logging_dir", str(tmp_path / "logs"), "--output_dir", str(tmp_path / "o")])
    assert "is a file: name a folder" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_the_mocked_maths_is_right() -> None:
    prompts, answers = example.mocked_maths(40)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert eval(prompt.removeprefix("what is ").removesuffix("?")) == int(answer)
