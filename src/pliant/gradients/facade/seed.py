"""What the seed's classes share: their settings, their steps, and logits with their targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pliant.data.collate import IGNORED
from pliant.errors import InvalidInput
from pliant.gradients.config import Engine, GradientConfig, Score, Selection
from pliant.gradients.schedule import Schedule


def config_of(
    *,
    min_tokens_ratio: float,
    warmup_steps: int,
    dynamic_threshold: bool,
    threshold_sensitivity: float,
    selection: Selection,
    scoring: Score,
    num_strata: int = 4,
    min_tokens_per_sequence: int = 1,
    engine: Engine = "exact",
) -> GradientConfig:
    """A GradientConfig from the seed's names."""
    return GradientConfig(
        engine=engine,
        ratio=min_tokens_ratio,
        selection=selection,
        score=scoring,
        warmup_steps=warmup_steps,
        dynamic=dynamic_threshold,
        sensitivity=threshold_sensitivity,
        num_strata=num_strata,
        min_tokens_per_sequence=min_tokens_per_sequence,
    )


class Steps:
    """A schedule, and the generators of its draws."""

    def __init__(self, config: GradientConfig) -> None:
        self.schedule = Schedule(config)
        self.draws = 0

    def begin(self, items: Any = None) -> None:
        """A forward pass begins, of a step that has so many tokens, if a Trainer counted them."""
        self.schedule.begin(items)

    def step(self) -> None:
        self.schedule.step()

    def ratio(self, confidence: Tensor) -> float:
        """Of this step; only a dynamic one waits for the confidence."""
        dynamic = self.schedule.config.dynamic
        return self.schedule.ratio(float(confidence) if dynamic else None)

    def generator(self) -> torch.Generator:
        """Of the next draw."""
        self.draws += 1
        return torch.Generator().manual_seed(self.schedule.config.seed * 1_000_003 + self.draws)

    def state(self) -> dict[str, Any]:
        return {**self.schedule.state(), "draws": self.draws}

    def load_state(self, state: dict[str, Any]) -> None:
        draws = state.get("draws")
        if not isinstance(draws, int) or draws < 0:
            raise InvalidInput(f"draws = {draws!r} in a saved state: give a whole number")
        self.schedule.load_state(state)
        self.draws = draws


def logits_of(outputs: Any) -> Tensor:
    """The logits of a tensor, a ModelOutput, a dict or a tuple (in which a loss may come first)."""
    logits = outputs
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    elif isinstance(outputs, (tuple, list)):
        logits = next((x for x in outputs if isinstance(x, Tensor) and x.dim() >= 2), None)
    elif not isinstance(outputs, Tensor):
        logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise InvalidInput(f"a {type(outputs).__name__} without logits: give a model's output")
    return logits


def aligned(outputs: Any, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) and the target of each, (B, T).

    A tensor's logits are aligned with their targets already, as (B, T, V) and (B, T) or as (N, V)
    and (N,), which is one row. A model's output is aligned with the labels of its inputs: each
    position predicts the next label, and the last none.
    """
    logits = logits_of(outputs)
    if targets is None:
        raise InvalidInput("there are no targets: criterion(logits, targets) takes them second")
    if logits.dim() not in (2, 3) or targets.shape != logits.shape[:-1]:
        raise InvalidInput(
            f"targets of shape {tuple(targets.shape)} for logits of {tuple(logits.shape)}: "
            "give (N,) for (N, V), or (B, T) for (B, T, V)"
        )
    if logits.dim() == 2:
        return logits[None], targets[None]
    if isinstance(outputs, Tensor):
        return logits, targets
    return logits, following(targets)


def following(labels_BT: Tensor) -> Tensor:
    """The label that each position predicts: the next one, and none at the end."""
    return torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


def mean_where(mask_BT: Tensor, values_BT: Tensor) -> Tensor:
    """The mean of the masked; 0 if there are none."""
    return torch.where(mask_BT, values_BT, 0.0).sum() / mask_BT.sum().clamp(min=1)
