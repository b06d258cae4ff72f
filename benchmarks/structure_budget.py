"""One budget over all parts of a model, beside each part alone: perplexity on test text.

    python -m benchmarks.structure_budget                                  # nano-l
    python -m benchmarks.structure_budget --model smollm2-135m --data FOLDER

A fifth of the parameters, and a fifth of the measured latency, is saved by every part alone and by
what `plan_pruning` makes of all of them. The plan chooses on held-out calibration text; the figures
are of test text, which it has not seen, relative to the whole model's. FOLDER is that of
`benchmarks.structure_prune`. The order in which layers go is measured once, for both budgets, and
read from the cache after that.
"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.harness import CACHE, RESULTS, commit, keep
from benchmarks.real_model import result_name
from benchmarks.structure_prune import ROWS, pieces
from pliant import nano
from pliant.loading import load
from pliant.reports.tables import Table
from pliant.structure import (
    PlanConfig,
    PruneConfig,
    calibration_batches,
    perplexity,
    plan_pruning,
    prune,
)
from pliant.structure.calibration import digest, samples_of

BUDGET = 0.2
QUESTIONS, TOKENS, LENGTH = 2_000, 12_288, 96  # of nano's world
TEST = 6_144  # tokens of each of the real model's test texts


def main(
    model: Annotated[str, typer.Option(help="By name or folder.")] = "nano-l",
    data: Annotated[Path | None, typer.Option(help="The folder of the real texts.")] = None,
    of: Annotated[list[str] | None, typer.Option(help="parameters, latency; repeatable.")] = None,
    tokens: Annotated[int, typer.Option(help="Of calibration text, for real models.")] = 6_144,
) -> None:
    """Print the table and write the result after each budget."""
    torch.set_num_threads(1)
    own, tokenizer = load(model, dtype="float32" if data is None else "bfloat16")
    own.requires_grad_(False)
    fitted, held_out, tests = texts(tokenizer, data, tokens)
    whole = {name: perplexity(own, batches) for name, batches in tests.items()}
    figures: dict[str, Any] = {"model": Path(model).name, "whole": whole, "budgets": {}}
    figures |= {"calibration tokens": sum(b["input_ids"].numel() for b in fitted)}
    figures |= before(result_name("structure_budget", model), figures)
    of_texts = digest(samples_of(fitted, torch.device("cpu")))
    orders = CACHE / f"{result_name('structure_budget', model)}-{of_texts}.json"
    order: list[int] = json.loads(orders.read_text()) if orders.is_file() else []
    for kind in of or ["parameters", "latency"]:
        config = PlanConfig(BUDGET, kind)  # type: ignore[arg-type]
        how: dict[str, Any] = {"controls": False, "layer_order": order, "report": say}
        start, known = time.process_time(), bool(order)
        plan = plan_pruning(own, fitted, held_out, config, **how)
        seconds = {"of the plan": round(time.process_time() - start), "order known": known}
        figures.setdefault("CPU seconds", {})[kind] = seconds
        order = list(plan.layer_order)
        CACHE.mkdir(exist_ok=True)
        orders.write_text(json.dumps(order))
        ways: dict[str, Any] = {}
        for point in plan.points:
            if point.saved < 0.97 * BUDGET:
                continue
            ratios = measured(own, fitted, point.config, plan.layer_order, tests, whole)
            ways[str(point)] = {"saved": point.saved, "ratio": ratios}
            ways[str(point)]["held out"] = point.perplexity / plan.whole
            ways[str(point)]["plan"] = point.config == plan.config
            print(str(point), ways[str(point)], flush=True)
        figures["budgets"][kind] = ways
        today = datetime.now(UTC).strftime("%Y-%m-%d")
        figures.setdefault("measured", {})[kind] = {"date": today, "commit": commit()}
        keep(result_name("structure_budget", model), figures, COMMAND)
    table(figures).draw(Console(highlight=False))


COMMAND = "python -m benchmarks.structure_budget --model MODEL --data FOLDER"


def before(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """The budgets that are measured already, on the same texts."""
    path = RESULTS / f"{name}.json"
    old = json.loads(path.read_text())["figures"] if path.is_file() else {}
    same = all(old.get(key) == figures[key] for key in ("model", "whole", "calibration tokens"))
    keys = ("budgets", "CPU seconds", "measured")
    return {key: old[key] for key in keys if key in old} if same else {}


def texts(tokenizer: Any, data: Path | None, tokens: int) -> tuple[Any, Any, dict[str, Any]]:
    """To fit on, to choose on (a quarter of each calibration text), and to measure with."""
    if data is None:
        rows = nano.conversations("train", QUESTIONS)
        batches = calibration_batches(rows, tokenizer, tokens=TOKENS, length=LENGTH)
        test = nano.conversations("test", QUESTIONS)
        tests = {"test": calibration_batches(test, tokenizer, tokens=TOKENS, length=LENGTH)}
        return [b for i, b in enumerate(batches) if i % 4], batches[::4], tests
    fitted, held_out = [], []
    for name in ("gsm8k-train.jsonl.gz", "wikitext2-valid.txt.gz"):
        ids = torch.cat([b["input_ids"] for b in pieces(data / name, tokenizer, tokens // 2)])
        split = max(1, len(ids) // 4)
        held_out.append({"input_ids": ids[:split]})
        fitted += [{"input_ids": rows} for rows in ids[split:].split(ROWS)]
    tests = {
        "gsm8k": pieces(data / "gsm8k-test.jsonl.gz", tokenizer, TEST),
        "wikitext2": pieces(data / "wikitext2-test.txt.gz", tokenizer, TEST),
    }
    return fitted, held_out, tests


def measured(
    model: Any,
    fitted: Any,
    config: PruneConfig,
    order: tuple[int, ...],
    tests: dict[str, Any],
    whole: dict[str, float],
) -> dict[str, float]:
    pruned = prune(model, fitted, config, layer_order=order)
    ratios = {name: perplexity(model, own) / whole[name] for name, own in tests.items()}
    pruned.detach()
    return ratios


def say(what: str, done: int, total: int) -> None:
    if done == total:
        print(what, flush=True)


def table(figures: dict[str, Any]) -> Table:
    names = list(figures["whole"])
    rows = [
        [
            kind,
            way,
            f"{f['saved']:.1%}",
            *(f"{f['ratio'][n]:.3f}" for n in names),
            "yes" * f["plan"],
        ]
        for kind, ways in figures["budgets"].items()
        for way, f in ways.items()
    ]
    head = ["a fifth of", "way", "saved", *names, "the plan"]
    title = f"{figures['model']}: perplexity, relative to the whole model's"
    return Table(title, head, rows, right=frozenset(["saved", *names]))


if __name__ == "__main__":
    typer.run(main)
