"""What regrowth is worth: the same training with regrown heads, and without any.

    python -m benchmarks.structure_regrowth [--seeds 3]

Half of an embedded model's heads are closed, the model trains on questions with their answers, a
fifth of the heads grows again, and it trains on. Beside each strategy of growth, for as many steps
on the same batches: no regrowth; as many heads in the end, but the difference never closed; and no
pruning at all. A seed is one order of training questions. Losses are of the answers to questions
that are neither trained nor measured on, in nats per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.harness import keep
from benchmarks.nano_answers import Batch, answer_batches
from pliant import nano
from pliant.reports.tables import Table
from pliant.structure import (
    PlasticityConfig,
    PlasticityResult,
    attach,
    attach_plasticity,
    compare_regrowth,
    perplexity,
    sleep,
)

PRUNE, REGROW, ROWS = 0.5, 0.2, 8
CONTROL, NEVER_CLOSED, WHOLE = "no regrowth", "these never closed", "nothing closed"
WAYS: dict[str, dict[str, Any]] = {
    CONTROL: {"regrow": 0.0},
    "gradient": {"growth": "gradient"},
    "entropy_gap": {"growth": "entropy_gap"},
    "balanced": {"growth": "balanced"},
    "random": {"growth": "random"},
    NEVER_CLOSED: {"regrow": 0.0},
}


def main(
    seeds: Annotated[int, typer.Option(help="Orders of the training questions.")] = 3,
    adapt: Annotated[int, typer.Option(help="Steps between pruning and regrowth.")] = 30,
    learn: Annotated[int, typer.Option(help="Steps after regrowth.")] = 60,
    rate: Annotated[float, typer.Option(help="The learning rate.")] = 1e-3,
    model: Annotated[list[str] | None, typer.Option(help="nano-s, nano-l; repeatable.")] = None,
) -> None:
    """Print the table and write the result."""
    torch.set_num_threads(1)
    console = Console(highlight=False)
    config = {"prune": PRUNE, "regrow": REGROW, "adapt": adapt, "learn": learn}
    figures: dict[str, Any] = {"config": {**config, "rate": rate, "rows": ROWS}, "models": {}}
    for name in model or nano.NAMES:
        runs: dict[str, list[PlasticityResult]] = {way: [] for way in WAYS}
        whole: list[float] = []
        for seed in range(seeds):
            for way, options in WAYS.items():
                if way == NEVER_CLOSED:  # as many heads in the end as with regrowth
                    gradient = runs["gradient"][-1]
                    share = 1 - gradient.rows[-1].open / gradient.heads
                    options = {**options, "prune": share}
                runs[way].append(run(name, seed, rate, PlasticityConfig(**{**config, **options})))
                console.print(f"{name}, seed {seed}, {way}: {runs[way][-1]}")
            whole.append(trained_whole(name, seed, rate, adapt + learn))
        figures["models"][name] = summary(runs, whole) | {"sleep": slept(name)}
        for way in set(WAYS) - {CONTROL, NEVER_CLOSED}:
            console.print(f"{name}, {way}: {compare_regrowth(runs[way], runs[CONTROL])}")
        command = f"python -m benchmarks.structure_regrowth --seeds {seeds}"
        keep("structure_regrowth", figures, command)
    draw(figures).draw(console)


def run(name: str, seed: int, rate: float, config: PlasticityConfig) -> PlasticityResult:
    model, tokenizer = nano.load(name)
    gates = attach(model).requires_grad_(False)
    plasticity = attach_plasticity(gates, config)
    plasticity.measure_on(calibration(tokenizer), held_out(tokenizer))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    plasticity.own_group(optimizer, rate)
    for batch in training(tokenizer, seed, config.steps):
        plasticity.begin_step()
        model(**batch).loss.backward()
        plasticity.before_update()
        optimizer.step()
        plasticity.after_update()
        optimizer.zero_grad()
    plasticity.begin_step()
    return plasticity.fold()


def trained_whole(name: str, seed: int, rate: float, steps: int) -> float:
    model, tokenizer = nano.load(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for batch in training(tokenizer, seed, steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss_of(model, held_out(tokenizer))


def slept(name: str) -> dict[str, Any]:
    """What sleep does to the model as it is."""
    model, tokenizer = nano.load(name)
    result = sleep(attach(model), calibration(tokenizer), held_out(tokenizer))
    return {**result.as_dict(), "finding": str(result)}


def loss_of(model: Any, batches: Sequence[Batch]) -> float:
    return float(torch.tensor(perplexity(model, batches), dtype=torch.float64).log())


def training(tokenizer: Any, seed: int, steps: int) -> list[Batch]:
    return list(answer_batches(tokenizer, "train", steps, ROWS, seed=100 + seed))


def calibration(tokenizer: Any) -> list[Batch]:
    return list(answer_batches(tokenizer, "train", 2, 32, seed=1))


def held_out(tokenizer: Any) -> list[Batch]:
    return list(answer_batches(tokenizer, "dev", 2, 64))


def summary(runs: dict[str, list[PlasticityResult]], whole: list[float]) -> dict[str, Any]:
    ways = {way: [figures_of(result) for result in results] for way, results in runs.items()}
    against = {
        way: {**compare_regrowth(own, runs[CONTROL]).as_dict(), "finding": finding(way, own, runs)}
        for way, own in runs.items()
        if way not in (CONTROL, NEVER_CLOSED)
    }
    beside_never_closed = compare_regrowth(runs["gradient"], runs[NEVER_CLOSED]).as_dict()
    return {
        "heads": runs[CONTROL][0].heads,
        "runs": ways,
        "beside no regrowth": against,
        "gradient beside these never closed": beside_never_closed,
        WHOLE: whole,
    }


def figures_of(result: PlasticityResult) -> dict[str, Any]:
    return {f"{row.phase} loss": row.loss for row in result.rows} | {"open": result.rows[-1].open}


def finding(way: str, own: list[PlasticityResult], runs: dict[str, list[PlasticityResult]]) -> str:
    return f"{way}: {compare_regrowth(own, runs[CONTROL])}"


def draw(figures: dict[str, Any]) -> Table:
    rows: list[list[str]] = []
    for name, own in figures["models"].items():
        for way, results in own["runs"].items():
            means = {k: sum(r.get(k, float("nan")) for r in results) / len(results) for k in KEYS}
            band = own["beside no regrowth"].get(way, {}).get("difference")
            beside = "" if band is None else "{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**band)
            losses = ["" if value != value else f"{value:.4f}" for value in means.values()]
            rows.append([name, way, *losses, f"{results[0]['open']}", beside])
        whole = sum(own[WHOLE]) / len(own[WHOLE])
        rows.append([name, WHOLE, "", "", "", "", f"{whole:.4f}", f"{own['heads']}", ""])
    head = ["model", "way", *KEYS, "open", "beside no regrowth"]
    return Table("Regrowth of heads: held-out loss, mean of the seeds", head, rows)


KEYS = ("before loss", "pruned loss", "adapted loss", "regrown loss", "learned loss")


if __name__ == "__main__":
    typer.run(main)
