"""What agency is worth: does it find heads that hurt, and is the loss lower with its states?

The embedded models as they are, and each with the output weights of one head negated, observe
batches of questions with their answers. Then the loss of the answers to other questions is measured
without agency, with its states, and with the same weights on random heads instead (the control).
"""

from __future__ import annotations

import random
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.harness import keep
from benchmarks.nano_answers import Batch, answer_batches, answer_loss
from pliant import nano
from pliant.reports.tables import Table
from pliant.structure import Agency, attach, attach_agency

BROKEN = {"nano-s": (None, (0, 1), (1, 0), (2, 2)), "nano-l": (None, (1, 2))}
"""For each model the head (layer, head) whose output weights are negated; None: no head's."""
DRAWS = 3
"""Of random heads, for the control."""


def main(
    batches: Annotated[int, typer.Option(help="Batches to observe.")] = 60,
    rows: Annotated[int, typer.Option(help="Questions in a batch.")] = 16,
) -> None:
    """Print the table and write the result."""
    torch.set_num_threads(1)
    figures = {
        _name(model, head): _measure(model, head, batches, rows)
        for model, heads in BROKEN.items()
        for head in heads
    }
    draw(figures).draw(Console(highlight=False))
    command = f"python -m benchmarks.structure_agency --batches {batches} --rows {rows}"
    keep("structure_agency", figures, command)


def _measure(name: str, broken: tuple[int, int] | None, batches: int, rows: int) -> dict[str, Any]:
    model, tokenizer = nano.load(name)
    gates = attach(model)
    if broken is not None:
        site = next(site for site in gates.sites if site.layer == broken[0])
        weight: Any = site.module.weight
        with torch.no_grad():
            weight.narrow(site.axis, broken[1] * site.width, site.width).neg_()
    test = list(answer_batches(tokenizer, "dev", 4, 64))
    before = answer_loss(model, test)
    agency = attach_agency(gates)
    for batch in answer_batches(tokenizer, "train", batches, rows):
        agency.observe(batch)
    report = agency.get_agency_report()
    misaligned = [(h.layer, h.head) for h in report.heads if h.state == "misaligned"]
    with_states = answer_loss(model, test)
    weights = [head.weight for head in report.heads]
    return {
        "heads": len(report.heads),
        "misaligned": misaligned,
        "overloaded": report.counts["overloaded"],
        "transitions": len(report.transitions),
        "the broken head is misaligned": broken in misaligned if broken else None,
        "loss": before,
        "loss with states": with_states,
        "loss with the weights on random heads": _control(agency, weights, model, test),
        "misaligned heads that the loss is lower without": _without(gates, misaligned, model, test),
    }


def _control(agency: Agency, weights: list[float], model: Any, test: list[Batch]) -> float:
    """The mean over draws."""
    losses = []
    for seed in range(DRAWS):
        shuffled = random.Random(seed).sample(weights, len(weights))
        with agency.disabled(), torch.no_grad():
            for site in agency.gates.sites:
                own, shuffled = shuffled[: site.count], shuffled[site.count :]
                agency.gates["heads", site.layer].copy_(torch.tensor(own))
            losses.append(answer_loss(model, test))
    with torch.no_grad():
        for gate in agency.gates.parameters():
            gate.fill_(1)
    agency.detach()
    return sum(losses) / DRAWS


def _without(gates: Any, heads: list[tuple[int, int]], model: Any, test: list[Batch]) -> int:
    """How many of these heads lower the loss when they alone are closed."""
    before, lower = answer_loss(model, test), 0
    for layer, head in heads:
        with torch.no_grad():
            gates["heads", layer][head] = 0
            lower += answer_loss(model, test) < before
            gates["heads", layer][head] = 1
    return lower


def _name(model: str, head: tuple[int, int] | None) -> str:
    return model if head is None else f"{model}, head {head[1]} of layer {head[0]} negated"


def draw(figures: dict[str, dict[str, Any]]) -> Table:
    losses = ["loss", "loss with states", "loss with the weights on random heads"]
    rows = [
        [
            name,
            f"{len(figure['misaligned'])} of {figure['heads']}",
            {None: "", True: "yes", False: "no"}[figure["the broken head is misaligned"]],
            f"{figure['misaligned heads that the loss is lower without']}",
            *(f"{figure[loss]:.3f}" for loss in losses),
        ]
        for name, figure in figures.items()
    ]
    head = ["model", "misaligned", "the negated one is", "lower loss without", *losses]
    return Table("Agency on questions and answers", head, rows, frozenset(head[3:]))


if __name__ == "__main__":
    typer.run(main)
