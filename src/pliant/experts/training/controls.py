"""An expert beside its controls: the base, the base with examples in the prompt, and a LoRA.

    controls = train_with_controls(model, tokenizer, rows, reward, config, folder="math",
                                   controls=ControlsConfig(shots=4, lora_rank=16))
    print(controls)              # all on the same held-out rows, differences paired

The examples are rows that the expert trains on. The LoRA is trained by the same steps on the same
number of answers, in the folder `lora` inside the expert's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pliant.data import Row, has_chat_template
from pliant.errors import InvalidInput, check_whole, named_settings
from pliant.experts.training.config import ExpertTrainingConfig
from pliant.experts.training.run import (
    ExpertResult,
    Measured,
    context_of,
    rewards_of,
    train_and_measure,
)
from pliant.experts.training.task import Task, encode, hold_out
from pliant.experts.training.trainer import RewardFunction, SafeReward
from pliant.stats import Band, bootstrap, paired
from pliant.training.folder import check_folder
from pliant.training.terminal import Say, print_to_stderr

BASE, EXPERT, LORA = "base", "expert", "lora"
BETWEEN = "\n\n"
"""Stands between examples where there is no chat template."""


@named_settings
@dataclass(frozen=True, kw_only=True)
class ControlsConfig:
    """What an expert is compared with, besides its base."""

    shots: int | None = None
    """The base with so many solved examples in the prompt; none: without this control."""
    lora_rank: int | None = None
    """A LoRA of this rank on every linear layer; none: without this control."""
    lora_learning_rate: float = 0.002
    """Of the LoRA, whose matrices need smaller steps than z."""
    # docs/experts-training.md: .900 and .917 on tasks on which experts had .756 and .960

    def __post_init__(self) -> None:
        for name in ("shots", "lora_rank"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        if not (math.isfinite(self.lora_learning_rate) and self.lora_learning_rate > 0):
            raise InvalidInput(
                f"lora_learning_rate = {self.lora_learning_rate!r}: give a number above 0"
            )


@dataclass(frozen=True)
class Way:
    """One way to answer the held-out prompts."""

    name: str
    reward: Band
    """The mean reward of its greedy answers."""
    gain: Band
    """Over the base, on the same resamples of the prompts."""
    behind: Band
    """The expert's reward less this one, on the same resamples."""
    trained: int
    """How many parameters were trained."""
    prompt_tokens: float
    """The mean length of a prompt."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Controls:
    """An expert's training, and what it is worth beside its controls."""

    expert: ExpertResult
    ways: tuple[Way, ...]
    """The base first, the expert last."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        *controls, expert = self.ways
        texts = [f"{way.name} {way.reward.value:.3f} ({_against(way.behind)})" for way in controls]
        return (
            f"on {self.expert.held_out:,} held-out rows the expert has {expert.reward.value:.3f}; "
            f"{'; '.join(texts)}"
        )

    def cells(self) -> list[list[str]]:
        """A row for each way, under `HEAD`."""
        return [
            [
                way.name,
                str(way.reward),
                "" if way.name == BASE else str(way.gain),
                "" if way.name == EXPERT else str(way.behind),
                f"{way.trained:,}",
                f"{way.prompt_tokens:.0f}",
            ]
            for way in self.ways
        ]


HEAD = ("way", "reward", "over the base", "the expert is ahead by", "trained", "tokens a prompt")


def train_with_controls(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    reward: RewardFunction,
    config: ExpertTrainingConfig,
    *,
    folder: str | Path,
    controls: ControlsConfig,
    held_out: Sequence[Row] | None = None,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    say: Say = print_to_stderr,
) -> Controls:
    """Train an expert as `train_expert` does, and measure its controls on the same held-out rows.

    Resumed, it continues with whichever training had not ended.
    """
    if held_out is None:
        rows, held_out = hold_out(rows, config.seed)
    own, lora = Path(folder).expanduser(), Path(folder).expanduser() / LORA
    if controls.lora_rank is not None:
        check_folder(lora, resume)
    task = encode(held_out, tokenizer, config.chat)
    shots = chosen_shots(rows, controls.shots or 0, config.seed)
    few_shot, end = with_shots(task, shots, model, tokenizer, config)
    common: dict[str, Any] = {"held_out": held_out, "resume": resume, "settings": settings}
    common["say"] = say
    expert = train_and_measure(model, tokenizer, rows, reward, config, folder=own, **common)
    ways = {BASE: (expert.before, 0, task)}
    if shots:
        say(f"answering the held-out prompts with {len(shots)} examples each")
        longest = config.max_new_tokens
        rewards = rewards_of(model, tokenizer, few_shot, SafeReward(reward), longest, end)
        ways[f"base, {len(shots)} examples"] = (rewards, 0, few_shot)
    if controls.lora_rank is not None:
        say(f"training a LoRA of rank {controls.lora_rank} with as many answers")
        common["before"] = expert.before
        control = _lora(model, tokenizer, rows, reward, config, controls, lora, common)
        ways[f"LoRA, rank {controls.lora_rank}"] = (control.after, control.result.trained, task)
    ways[EXPERT] = (expert.after, expert.result.trained, task)
    return Controls(expert.result, _ways(ways))


def _lora(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    reward: RewardFunction,
    config: ExpertTrainingConfig,
    controls: ControlsConfig,
    folder: Path,
    common: Mapping[str, Any],
) -> Measured:
    """The same training with a LoRA in the place of the expert."""
    from peft import LoraConfig
    from transformers import set_seed

    rank = controls.lora_rank or 0
    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    set_seed(config.seed)  # of its first matrices
    own = replace(config, learning_rate=controls.lora_learning_rate)
    return train_and_measure(
        model, tokenizer, rows, reward, own, folder=folder, peft_config=settings, **common
    )


def _ways(measured: Mapping[str, tuple[Sequence[float], int, Task]]) -> tuple[Way, ...]:
    rewards = {name: np.asarray(own, dtype=float) for name, (own, _, _) in measured.items()}

    def mean(name: str) -> Any:
        return lambda rows: float(rewards[name][rows].mean())

    count = len(rewards[BASE])
    return tuple(
        Way(
            name,
            bootstrap(mean(name), count),
            paired(mean(name), mean(BASE), count),
            paired(mean(EXPERT), mean(name), count),
            trained,
            float(np.mean([len(ids) for ids in task.ids])),
        )
        for name, (_, trained, task) in measured.items()
    )


def _against(behind: Band) -> str:
    if not behind.excludes(0):
        return "no clear difference"
    return f"the expert is {'ahead' if behind.value > 0 else 'behind'} by {abs(behind.value):.3f}"


# --- examples in the prompt ----------------------------------------------------------------------


def chosen_shots(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """So many rows with an answer, with different prompts, drawn at random."""
    if not count:
        return []
    solved = {str(row["prompt"]): row for row in rows if _answer_of(row).strip()}
    if len(solved) < count:
        raise InvalidInput(
            f"{count} examples of {len(solved)} different training rows with an answer: ask for "
            "fewer"
        )
    return random.Random(seed).sample(list(solved.values()), count)


def with_shots(
    task: Task, shots: Sequence[Row], model: Any, tokenizer: Any, config: ExpertTrainingConfig
) -> tuple[Task, str | None]:
    """The task with the examples before each prompt, and what ends an answer.

    With a chat template, examples are earlier turns of the conversation. Without one, they are
    texts, and an answer ends where the next example would begin.
    """
    chat = config.chat and has_chat_template(tokenizer)
    prompts = [_conversation(row["prompt"], shots, chat) for row in task.rows]
    longest = context_of(model) - config.max_new_tokens
    ids = encode([{"prompt": prompt} for prompt in prompts], tokenizer, chat).ids
    if shots and (most := max(map(len, ids))) > longest:
        raise InvalidInput(
            f"a prompt with {len(shots)} examples has {most:,} tokens, and with the answer at most "
            f"{longest:,} fit the model's context: ask for fewer examples"
        )
    ends = not chat and not any(BETWEEN in _answer_of(shot) for shot in shots)
    return Task(task.rows, ids), BETWEEN if ends else None


def _conversation(prompt: Any, shots: Sequence[Row], chat: bool) -> Any:
    """A text, or messages, with the examples before the question."""
    if isinstance(prompt, str) and not chat:
        texts = [f"{_as_text(shot['prompt'])} {_answer_of(shot)}{BETWEEN}" for shot in shots]
        return "".join(texts) + prompt
    system, asked = _turns(prompt)
    earlier: list[Any] = []
    for shot in shots:
        earlier += [*_turns(shot["prompt"])[1], {"role": "assistant", "content": _answer_of(shot)}]
    return [*system, *earlier, *asked]


def _turns(prompt: Any) -> tuple[list[Any], list[Any]]:
    """The system's messages, and the others."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    system = [message for message in messages if message["role"] == "system"]
    return system, [message for message in messages if message["role"] != "system"]


def _as_text(prompt: Any) -> str:
    text = prompt if isinstance(prompt, str) else str(_turns(prompt)[1][-1]["content"])
    return text.rstrip()


def _answer_of(row: Row) -> str:
    """Of several right answers, the first."""
    answer = row.get("answer")
    if isinstance(answer, list | tuple):
        answer = answer[0] if answer else None
    return "" if answer is None else str(answer)
