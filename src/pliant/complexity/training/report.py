"""What a training cost: the run as a whole, prefill included, then its parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainerCallback

from pliant.complexity.prefix_cache.policy import Storage


@dataclass(frozen=True)
class TrainingReport:
    """`print(report)` shows it as text."""

    seconds: float
    """Of the run: prefill, epochs, evaluations, checkpoints."""
    prefill_seconds: float
    """Of storing the prompts, and of choosing where."""
    epoch_seconds: tuple[float, ...]
    """Of each epoch, without the evaluation after it."""
    epochs: float
    """All epochs of the training, those before it was resumed too."""
    prompts: int
    prompt_tokens: int
    """Of all training prompts."""
    stored_tokens: int
    """That were run once and stored, those of evaluation too."""
    storage: dict[str, Storage]
    """Where the prefixes of each data set were stored, and why."""
    loss: float
    """The mean over this run's steps."""
    evaluation: dict[str, float]
    """The metrics of the last one."""
    duplicates: str
    """The prompts that are in both the training and the evaluation set."""

    @property
    def kept(self) -> dict[str, Storage]:
        """The former name of `storage`."""
        return self.storage

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.seconds:.1f} s for {self.epochs:g} epochs over {self.prompts:,} prompts "
            f"({self.prompt_tokens:,} tokens), of which {self.prefill_seconds:.1f} s went into "
            f"storing {self.stored_tokens:,} tokens",
        ]
        if self.epoch_seconds:
            mean = sum(self.epoch_seconds) / len(self.epoch_seconds)
            lines.append(f"an epoch on top of that: {mean:.2f} s")
        lines += [f"{name}: {place.where} ({place.why})" for name, place in self.storage.items()]
        metrics = [f"{name} {value:.4f}" for name, value in self.evaluation.items()]
        evaluated = f"; evaluation: {', '.join(metrics)}" if metrics else ""
        lines.append(f"mean training loss {self.loss:.4f}{evaluated}")
        return "\n".join([*lines, *([self.duplicates] if self.duplicates else [])])


class Clock(TrainerCallback):
    """Times one run of a trainer; `store` stores its prefixes once the model is on its device."""

    def __init__(self, store: Callable[[], None]) -> None:
        self.store = store
        self.start()

    def start(self) -> None:
        self.began = time.perf_counter()
        self.prefill = 0.0
        self.epochs: list[float] = []

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        began = self.seconds
        self.store()
        self.prefill = self.seconds - began

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._epoch = self.seconds

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.epochs.append(self.seconds - self._epoch)


def last_evaluation(history: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of a log's last evaluation, without its timing."""
    last = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    timing = ("runtime", "per_second")
    return {
        name.removeprefix("eval_"): value
        for name, value in last.items()
        if name.startswith("eval_") and not name.endswith(timing)
    }
