"""The cost of a score that is read while the model generates, against generating alone.

All run the same prompt and generate greedily; the tokens are compared in every round. The second
control computes the score in a forward pass of its own, before generating.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contest import contest
from benchmarks.gpu.models import build, random_ids
from benchmarks.gpu.rows import Keep
from benchmarks.gpu.scorer import SCORERS, trained
from benchmarks.harness import interleaved
from pliant.complexity import Complexity, CPXConfig


def measure(settings: dict[str, Any], device: str, keep: Keep) -> None:
    model = build(settings, device).requires_grad_(False)
    ids = random_ids(model, 1, settings["prompt"])
    for name in settings["scorers"]:
        scorer = trained(model, CPXConfig(**SCORERS[name]))
        compete(scorer, ids, settings, device, lambda run, f, n=name: keep(f"{run}, {n}", f))
        keep(f"the step alone, {name}", step_alone(scorer, ids, settings["rounds"]))
        scorer.detach()


def compete(
    scorer: Complexity, ids: Tensor, settings: dict[str, Any], device: str, keep: Keep
) -> None:
    new = settings["new"]
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    plain = scorer.base.generate(ids, attention_mask=mask, **options)
    checks: list[bool] = []

    def alone() -> None:
        scorer.base.generate(ids, attention_mask=mask, **options)

    def scored() -> None:
        output = scorer.generate(ids, attention_mask=mask, **options)
        checks.append(torch.equal(output.outputs[0], plain) and not output.prefilled_again)

    def before() -> None:
        scorer.score(ids)
        alone()

    runs = {"generate": alone, "score + generate": scored, "score, then generate": before}
    contest(runs, "generate", settings["rounds"], device, keep, warmup=1)
    keep("tokens", {"identical": all(checks), "rounds": len(checks), "passed": all(checks)})


def step_alone(scorer: Complexity, ids: Tensor, rounds: int) -> dict[str, float]:
    """The rows on a prefilled prompt: what scoring adds to a generation."""
    with torch.no_grad():
        prefilled = scorer.prefilled(ids)
        runs = {"step": lambda: scorer.logits_of(prefilled)}
        return {"seconds": interleaved(runs, rounds=rounds)["step"].median}
