"""What a training cost: the run as a whole, prefill included, then its parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pliant.complexity.prefix_cache.policy import Storage

if TYPE_CHECKING:
    from pliant.complexity.training.trainer import CPXTrainer


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
        lines.append(", ".join([f"training loss {self.loss:.4f}", *metrics]))
        return "\n".join([*lines, *([self.duplicates] if self.duplicates else [])])


class Clock:
    """Times one run of a trainer."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.prefill = 0.0
        self.tokens = 0
        self.epochs: list[float] = []
        self._epoch = self.began

    @contextmanager
    def prefilling(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.prefill += time.perf_counter() - began

    def epoch_begins(self) -> None:
        self._epoch = time.perf_counter()

    def epoch_ends(self) -> None:
        self.epochs.append(time.perf_counter() - self._epoch)

    def report(self, trainer: CPXTrainer, output: Any) -> TrainingReport:
        dataset: Any = trainer.train_dataset
        duplicates = trainer.duplicates
        return TrainingReport(
            seconds=time.perf_counter() - self.began,
            prefill_seconds=self.prefill,
            epoch_seconds=tuple(self.epochs),
            epochs=float(trainer.state.epoch or 0),
            prompts=len(dataset),
            prompt_tokens=dataset.tokens,
            stored_tokens=self.tokens,
            storage=dict(trainer.storage),
            loss=float(output.training_loss),
            evaluation=_last_evaluation(trainer.state.log_history),
            duplicates=str(duplicates) if duplicates else "",
        )


def _last_evaluation(history: list[dict[str, float]]) -> dict[str, float]:
    last = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    timing = ("runtime", "per_second")
    return {
        name.removeprefix("eval_"): value
        for name, value in last.items()
        if name.startswith("eval_") and not name.endswith(timing)
    }
