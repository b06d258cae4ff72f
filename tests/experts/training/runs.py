"""A toy task, and trainers on it, for these tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.minimal_adapter import tiny_llama

from pliant.experts.model import svf_layers
from pliant.experts.training.config import ExpertTrainingConfig
from pliant.experts.training.run import ExpertResult, train_expert
from pliant.experts.training.task import encode
from pliant.experts.training.trainer import TRAINERS, SafeReward
from pliant.loading import load_tokenizer

ROWS = [{"prompt": f"{'the prompt ' * (i % 3)}q{i}", "answer": str(i)} for i in range(12)]
HALF = 128
RUN = ("resume", "say", "held_out", "peft_config")


def lower_half(completion_ids: Any, **_: Any) -> list[float]:
    """The share of tokens from the vocabulary's lower half: half of them at first."""
    return [sum(token < HALF for token in ids) / len(ids) for ids in completion_ids]


def tokenizer() -> Any:
    return load_tokenizer("nano-s")


def model(**changes: Any) -> Any:
    """Large random weights, so that singular values make a difference."""
    return tiny_llama(
        vocab_size=260,
        initializer_range=0.4,
        max_position_embeddings=128,
        eos_token_id=257,
        pad_token_id=256,
        **changes,
    )


def config(**changes: Any) -> ExpertTrainingConfig:
    common: dict[str, Any] = {"prompts": 4, "group": 4, "max_new_tokens": 6, "steps": 4}
    common |= {
        "logging_steps": 1,
        "save_steps": 2,
        "learning_rate": 0.05,
        "chat": False,
        "parts": "all",
    }
    return ExpertTrainingConfig(**{**common, **changes})


def trained(
    folder: Path, reward: Any = lower_half, base: Any = None, **options: Any
) -> ExpertResult:
    run = {k: options.pop(k) for k in RUN if k in options}
    run.setdefault("say", lambda line: None)
    base = model() if base is None else base
    own = config(**options)
    settings = {"use_cpu": True}
    return train_expert(
        base, tokenizer(), ROWS, reward, own, folder=folder, settings=settings, **run
    )


def trainer(folder: Path, reward: Any = lower_half, base: Any = None, **changes: Any) -> Any:
    own = config(**changes)
    return TRAINERS[own.method](
        model() if base is None else base,
        args=own.arguments(folder, save_strategy="no"),
        processing_class=tokenizer(),
        peft_config=own.expert,
        config=own,
        task=encode(ROWS, tokenizer(), chat=False),
        reward=SafeReward(reward),
    )


def rollouts(run: Any, prompts: int = 4) -> dict[str, Any]:
    """What a step of this trainer is made of."""
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    answers: dict[str, Any] = run._generate_and_score_completions([{}] * prompts * 4)
    return answers


def z_of(peft: Any) -> dict[str, torch.Tensor]:
    return {
        f"{path} {name}": d.detach().clone()
        for path, layer in svf_layers(peft)
        for name, d in layer.changes().items()
    }


def set_z(peft: Any, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in svf_layers(peft):
            for change in layer.changes().values():
                change.copy_(0.3 * torch.randn(change.shape, generator=generator))
