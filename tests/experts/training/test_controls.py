"""An expert beside its controls: examples in the prompt, and a LoRA with as many answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.experts.training.runs import ROWS, config, lower_half, model, tokenizer

from pliant.data import chat_ids
from pliant.errors import InvalidInput
from pliant.experts.training.controls import (
    ControlsConfig,
    chosen_shots,
    train_with_controls,
    with_shots,
)
from pliant.experts.training.task import encode

SHOTS: list[Any] = [
    {"prompt": "1+1", "answer": "2"},
    {"prompt": [{"role": "user", "content": "2+2 "}], "answer": ["4", "four"]},
]


def compared(folder: Path, **options: Any) -> Any:
    run = {"resume": options.pop("resume", False), "reward": options.pop("reward", lower_half)}
    return train_with_controls(
        model(),
        tokenizer(),
        ROWS,
        config=config(steps=2),
        folder=folder,
        controls=ControlsConfig(**options),
        settings={"use_cpu": True},
        say=lambda line: None,
        **run,
    )


def test_every_way_answers_the_same_held_out_rows(tmp_path: Path) -> None:
    seen: list[tuple[str, ...]] = []

    def reward(prompts: Any, completion_ids: Any, **_: Any) -> list[float]:
        seen.append(tuple(prompts))
        return lower_half(completion_ids)

    controls = compared(tmp_path / "run", reward=reward, shots=2, lora_rank=3)
    names = ["base", "base, 2 examples", "LoRA, rank 3", "expert"]
    assert [way.name for way in controls.ways] == names
    base, few_shot, lora, expert = controls.ways
    asked = seen[0]
    rollouts = [len(prompts) for prompts in seen if prompts != asked]
    assert len(asked) == controls.expert.held_out and rollouts == [16, 16, 16, 16]
    trained_on = [i for i, prompts in enumerate(seen) if prompts != asked]
    assert trained_on == [1, 2, 5, 6]  # the expert is measured, and the examples, then the LoRA
    assert base.reward == controls.expert.before and expert.reward == controls.expert.after
    assert expert.gain == controls.expert.gain and expert.behind.value == 0 == base.gain.value
    for way in (few_shot, lora):
        assert way.gain.value == pytest.approx(way.reward.value - base.reward.value)
        assert way.behind.value == pytest.approx(expert.reward.value - way.reward.value)
    assert few_shot.prompt_tokens > base.prompt_tokens == lora.prompt_tokens
    assert (base.trained, few_shot.trained) == (0, 0) and lora.trained > 3 * expert.trained > 0
    settings = json.loads((tmp_path / "run" / "lora" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 3, 6)
    assert "held-out rows the expert has" in str(controls)
    again = compared(tmp_path / "run", reward=reward, resume=True, shots=2, lora_rank=3)
    assert [way.as_dict() for way in again.ways] == [way.as_dict() for way in controls.ways]
    with pytest.raises(InvalidInput, match="begun with another rank"):
        compared(tmp_path / "run", reward=reward, resume=True, lora_rank=2)


def test_examples_are_turns_of_a_conversation_or_texts() -> None:
    own, rows = tokenizer(), [{"prompt": "3+3", "answer": "6"}]
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3+3"}]
    turns = [
        asked[0],
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2 "},
        {"role": "assistant", "content": "4"},
        asked[1],
    ]
    chat = config(chat=True)
    for prompt, messages in (("3+3", turns[1:]), (asked, turns)):
        task = encode([{**rows[0], "prompt": prompt}], own)
        few_shot, end = with_shots(task, SHOTS, model(), own, chat)
        assert few_shot.ids == [chat_ids(messages, own)] and end is None
        assert few_shot.rows == task.rows
    plain = encode(rows, own, chat=False)
    few_shot, end = with_shots(plain, SHOTS, model(), own, config(chat=False))
    assert own.decode(few_shot.ids[0]) == "1+1 2\n\n2+2 4\n\n3+3" and end == "\n\n"
    code = [{"prompt": "f", "answer": "def f():\n\n    return 1"}]
    assert with_shots(plain, code, model(), own, config(chat=False))[1] is None


def test_a_text_answer_ends_where_the_next_example_would_begin(tmp_path: Path) -> None:
    from pliant.experts.training import run

    texts: list[str] = []

    class Speaks:
        def batch_decode(self, ids: Any, **_: Any) -> list[str]:
            return ["\n 6\n\n9+9 18"]

    def reward(completions: Any, **_: Any) -> list[float]:
        texts.extend(completions)
        return [1.0]

    task = encode([{"prompt": "3+3"}], tokenizer(), chat=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "greedy_answers", lambda *_: [[1]])
        run.rewards_of(model(), Speaks(), task, run.SafeReward(reward), 4, "\n\n")
    assert texts == ["6"]


def test_what_cannot_be_compared_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="30 examples of 10 different training rows"):
        compared(tmp_path / "run", shots=30)
    with pytest.raises(InvalidInput, match="fit the model's context: ask for fewer examples"):
        compared(tmp_path / "run", shots=9)
    (tmp_path / "run" / "lora").mkdir(parents=True)
    (tmp_path / "run" / "lora" / "notes.txt").write_text("mine")
    with pytest.raises(InvalidInput, match="lora: is not empty"):
        compared(tmp_path / "run", lora_rank=2)
    with pytest.raises(InvalidInput, match="lora_learning_rate = 0"):
        ControlsConfig(lora_learning_rate=0)
    assert not (tmp_path / "run" / "pliant-train.json").exists()
    rows = [{"prompt": "a", "answer": ""}, {"prompt": "b", "answer": []}, {"prompt": "c"}]
    with pytest.raises(InvalidInput, match="1 examples of 0 different"):
        chosen_shots(rows, 1, 0)
