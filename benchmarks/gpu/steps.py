"""The time and memory of a step of selective training, beside standard training.

A step is forward and backward of one batch, without an optimizer. The standard step runs on a model
of its own, to which nothing is attached. Ratios are paired: each round runs every contender once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gpu.contest import contest
from benchmarks.gpu.models import build, compiled, graphs, random_ids
from benchmarks.gpu.rows import Keep
from pliant.gradients import GradientConfig, attach

OURS: dict[str, dict[str, Any]] = {
    "sparse .25": {"ratio": 0.25},
    "sparse .25, uniform": {"ratio": 0.25, "selection": "uniform"},
    "exact .25": {"ratio": 0.25, "engine": "exact"},
}
COMPLETION, SAME_LABELS = "completion (20 %)", "standard on the same labels"
PROMPT = 0.8  # of a sequence, where completions are trained


def measure(settings: dict[str, Any], device: str, keep: Keep) -> None:
    plain = build(settings, device).train()
    ours = build(settings, device).train()
    compiled(plain, settings)
    compiled(ours, settings)
    ids = random_ids(plain, settings["batch"], settings["length"])
    completion = ids.clone()
    completion[:, : int(PROMPT * ids.shape[1])] = -100
    gradients = attach(ours, GradientConfig())

    def selective(labels: Tensor, **options: Any) -> Callable[[], None]:
        config = GradientConfig(**options)

        def run() -> None:
            gradients.switch(config)
            step(ours, ids, labels)
            if gradients.engine != config.engine:
                raise RuntimeError(f"the engine in use is {gradients.engine}, not {config.engine}")

        return run

    name, quarter = a_quarter(ids)
    runs = {
        "standard": lambda: step(plain, ids, ids),
        name: lambda: step(plain, quarter, quarter),
        **{title: selective(ids, **options) for title, options in OURS.items()},
    }
    contest(runs, "standard", settings["rounds"], device, keep)
    runs = {
        SAME_LABELS: lambda: step(plain, ids, completion),
        COMPLETION: selective(completion, engine="completion"),
    }
    contest(runs, SAME_LABELS, settings["rounds"], device, keep)
    if "compiled" in settings:
        keep("compiler", graphs())


def step(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> None:
    model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def a_quarter(ids: Tensor) -> tuple[str, Tensor]:
    """The other way to spend a quarter: fewer sequences, or, of a single one, fewer tokens."""
    if len(ids) >= 4:
        return "a quarter of the sequences", ids[: len(ids) // 4]
    return "a quarter of the tokens", ids[:, : max(8, ids.shape[1] // 4)]
