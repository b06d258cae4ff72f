"""Training a scorer on stored prefixes against the seeds' loop, which runs every prompt each epoch.

Both train one [CPX] row and a head on the same random prompts with the same batch size. The
prefixes lie in the machine's memory, so a step moves a batch of keys and values to the device:
whether that beats running the prompts again depends on the machine, and "recomputed" (no prefixes,
and no gradient through the prompts) stands beside it. Epochs are timed in turns;
the run over many epochs counts the prefill in, and the control's as many times the median of its
epochs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.contest import peak_bytes
from benchmarks.gpu.engines import difference
from benchmarks.gpu.models import build, random_ids
from benchmarks.gpu.rows import Keep
from benchmarks.harness import Times
from benchmarks.seed_loop import SeedLoop
from pliant.complexity import Complexity, CPXConfig, attach, fit, remember
from pliant.complexity.training.config import CPXTrainingConfig

EPOCHS = 2  # of a timed fit: of these the last counts


def measure(settings: dict[str, Any], device: str, keep: Keep) -> None:
    batch, rounds = settings["batch"], settings["rounds"]
    scorer = attach(build(settings, device).requires_grad_(False), CPXConfig())
    ids = random_ids(scorer.base, settings["prompts"], settings["length"])
    labels = torch.randint(0, 2, (len(ids), 1), generator=torch.Generator().manual_seed(0)).float()
    control = seed_loop(scorer, settings, device)
    targets = labels.to(device)
    keep("gradients", gradient_gap(scorer, control, ids[:batch], targets[:batch]))

    prompts, wanted = ids.tolist(), labels[:, 0].tolist()
    began = time.perf_counter()
    stored = remember(scorer, prompts)
    keep("prefixes", {"seconds": time.perf_counter() - began, "bytes": stored.bytes})

    def ours(**options: Any) -> float:
        report = fit(scorer, prompts, wanted, batch_size=batch, num_epochs=EPOCHS, **options)
        return report.epoch_seconds[-1]

    recompute = CPXTrainingConfig(prefixes="recompute")
    runs: dict[str, Callable[[], float]] = {
        "stored": lambda: ours(prefixes=stored),
        "recomputed": lambda: ours(config=recompute),
        "the seeds' loop": lambda: timed(lambda: control.epoch(ids, targets, batch), device),
    }
    epochs = in_turns(runs, rounds)
    for name, times in epochs.items():
        ratio = epochs["the seeds' loop"].ratio_to(times).as_dict()
        keep(f"an epoch, {name}", {"seconds": times.median, "times as fast": ratio})
    many(scorer, prompts, wanted, settings, epochs["the seeds' loop"].median, keep)
    keep("peak bytes", {name: peak_bytes(run, device) for name, run in runs.items()})


def many(
    scorer: Complexity,
    prompts: list[list[int]],
    wanted: list[float],
    settings: dict[str, Any],
    epoch: float,
    keep: Keep,
) -> None:
    """A whole training, the prefill counted in."""
    count = settings["epochs"]
    report = fit(scorer, prompts, wanted, batch_size=settings["batch"], num_epochs=count)
    keep(
        f"{count} epochs",
        {
            "seconds": report.seconds,
            "prefill alone": report.prefill_seconds,
            "stored": str(report.storage["train"].where),
            "the seeds' loop, seconds": count * epoch,
            "times as fast": count * epoch / report.seconds,
        },
    )


def seed_loop(scorer: Complexity, settings: dict[str, Any], device: str) -> SeedLoop:
    """On a model of its own; its new vocabulary row starts as our virtual one."""
    control = SeedLoop(build(settings, device))
    control.head.to(device)
    with torch.no_grad():
        torch.nn.init.normal_(scorer.head.weight, std=0.02)
        control.embeddings[control.cpx] = scorer.rows[0]
        control.head.weight.copy_(scorer.head.weight)
        control.head.bias.copy_(scorer.head.bias)
    return control


def gradient_gap(
    scorer: Complexity, control: SeedLoop, ids: Tensor, targets: Tensor
) -> dict[str, float]:
    """How much the gradients of one batch differ, relative to their norm."""
    loss = F.binary_cross_entropy_with_logits
    loss(scorer.logits(ids), targets).backward()
    loss(control.logits(ids), targets).backward()
    pairs = {
        "row": (scorer.rows.grad[0], control.embeddings.grad[control.cpx]),
        "head": (scorer.head.weight.grad, control.head.weight.grad),
        "bias": (scorer.head.bias.grad, control.head.bias.grad),
    }
    figures = {name: difference(ours, theirs) for name, (ours, theirs) in pairs.items()}
    scorer.zero_grad(set_to_none=True)
    control.optimizer.zero_grad()
    return figures


def in_turns(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, Times]:
    """The seconds that each run reports, once a round, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = run()
            if number:
                seconds[name].append(taken)
    return {name: Times(tuple(taken)) for name, taken in seconds.items()}


def timed(run: Callable[[], Any], device: str) -> float:
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
