"""Training a scorer on stored prefixes against the seeds' loop, which runs every prompt each epoch.

    python -m benchmarks.cpx_training [--model smollm2-135m] [--rounds 3] [--lengths 256]

Both train the same parameters (one [CPX] row, a head with a bias) on the same random prompts with
the same optimizer. Epochs are timed in turns, and twenty of our epochs once, including the prefill.
The control reuses nothing between epochs, so its twenty count as twenty times the median of the
timed epochs; `--whole` runs all of them, which takes nearly half an hour. The control starts with
our row, and after one step its gradients are compared with ours. Times are CPU seconds of this
process, on one thread.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback

from benchmarks import real_model
from benchmarks.harness import Times, keep
from benchmarks.seed_loop import SeedLoop
from pliant.complexity import CPXConfig, attach
from pliant.complexity.prefix_cache.store import in_memory
from pliant.complexity.training.config import CPXTrainingConfig
from pliant.complexity.training.dataset import PromptDataset
from pliant.complexity.training.trainer import CPXTrainer

EPOCHS = 20
TARGET = {256: (45.0, 12.0), 1024: (100.0, 15.0)}
"""How many times as fast: an epoch, and twenty with the prefill."""
REAL_TARGET = dict.fromkeys(TARGET, (30.0, 10.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="of all prompts")
    parser.add_argument("--batch", type=int, default=8, help="prompts a step, at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--whole", action="store_true", help="run all of the control's 20 epochs")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(TARGET))
    real_model.add_model_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {str(length): measured(length, options) for length in options.lengths}
    Console().print(table(figures, REAL_TARGET if options.model else TARGET))
    keep(
        real_model.result_name("cpx_training", options.model),
        {"model": real_model.described(options.model, sizes(), options.dtype), **figures},
        real_model.command("cpx_training", options.model),
    )


def measured(length: int, options: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    prompts = max(1, options.tokens // length)
    ids = torch.randint(0, sizes().vocab_size, (prompts, length), generator=generator)
    if options.model:
        ids = real_model.prompts(options.model, prompts, length)
    labels = torch.randint(0, 2, (prompts, 1), generator=generator).float()
    ours, control = contestants(options.model, options.dtype)
    gap = gradient_gap(ours, control, ids[: options.batch], labels[: options.batch])
    epochs: dict[str, list[float]] = {name: [] for name in ("ours", "control")}
    stored = PromptDataset(tuple(ids), labels)
    train(ours, stored, options.batch, 2)  # stores the prompts, and warms up
    control.step(ids[:1], labels[:1])
    for _ in range(options.rounds):
        epochs["ours"].append(train(ours, stored, options.batch, 2).epochs[-1])
        epochs["control"].append(timed(lambda: control.epoch(ids, labels, options.batch)))
    control_times = Times(tuple(epochs["control"]))
    ratio = control_times.ratio_to(Times(tuple(epochs["ours"])))
    ours_twenty = train(ours, PromptDataset(tuple(ids), labels), options.batch, EPOCHS)
    control_seconds = EPOCHS * control_times.median
    if options.whole:
        control_seconds = timed(
            lambda: [control.epoch(ids, labels, options.batch) for _ in range(EPOCHS)]
        )
    return {
        "prompts": prompts,
        "batch": options.batch,
        "epoch_seconds": epochs,
        "epoch_times_as_fast": ratio.as_dict(),
        "twenty_epochs_seconds": {"ours": ours_twenty.seconds, "control": control_seconds},
        "control_epochs_run": EPOCHS if options.whole else options.rounds,
        "of_which_epochs": sum(ours_twenty.epochs),
        "twenty_epochs_times_as_fast": control_seconds / ours_twenty.seconds,
        "storage": ours_twenty.storage,
        "largest_gradient_difference": gap,
    }


def contestants(name: str | None, dtype: str) -> tuple[Any, SeedLoop]:
    """Two copies of one model; the control's new vocabulary row starts as our virtual one."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(sizes()).eval()
    if name:
        model = real_model.real_model(name, dtype)
    control = SeedLoop(copy.deepcopy(model))
    scorer = attach(model.requires_grad_(False), CPXConfig())
    with torch.no_grad():
        torch.nn.init.normal_(scorer.head.weight, std=0.02)
        control.embeddings[control.cpx] = scorer.rows[0]
        control.head.weight.copy_(scorer.head.weight)
        control.head.bias.copy_(scorer.head.bias)
    return scorer, control


def gradient_gap(scorer: Any, control: SeedLoop, ids: Tensor, labels: Tensor) -> float:
    """The largest difference of any entry between stored prefixes and the control's loop."""
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    stored = in_memory(scorer.prefilled, list(ids))
    loss(scorer.logits_of(stored.batch(range(len(ids))).to_prefilled(scorer)), labels).backward()
    loss(control.logits(ids), labels).backward()
    pairs = [
        (scorer.rows.grad[0], control.embeddings.grad[control.cpx]),
        (scorer.head.weight.grad, control.head.weight.grad),
        (scorer.head.bias.grad, control.head.bias.grad),
    ]
    gap = max((a - b).abs().max().item() for a, b in pairs)
    scorer.zero_grad()
    control.optimizer.zero_grad()
    return gap


class Work(TrainerCallback):
    """The CPU time of a training: in total, and for each epoch."""

    seconds: float
    storage: str

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.began = 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.process_time()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.epochs.append(time.process_time() - self.began)


def train(scorer: Any, dataset: PromptDataset, batch: int, epochs: int) -> Work:
    config = CPXTrainingConfig(batch_size=batch, num_epochs=epochs, prefixes="memory")
    args = config.training_arguments(use_cpu=True, disable_tqdm=True, logging_strategy="no")
    work = Work()
    trainer = CPXTrainer(scorer, args, config=config, train_dataset=dataset, callbacks=[work])
    trainer.remove_callback(PrinterCallback)
    work.seconds = timed(trainer.train)
    work.storage = trainer.report.storage["train"].where if trainer.report else ""
    return work


def timed(run: Any) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def sizes() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=32_000,
        max_position_embeddings=2048,
    )


def table(figures: dict[str, Any], targets: dict[int, tuple[float, float]]) -> Table:
    columns = ("prompt tokens", "an epoch", "target", "20 epochs", "target", "gradients differ by")
    rows = Table(*columns)
    for length, figure in figures.items():
        epoch, twenty = targets.get(int(length), (0.0, 0.0))
        rows.add_row(
            length,
            f"{figure['epoch_times_as_fast']['median']:.1f}x",
            f">= {epoch:g}x",
            f"{figure['twenty_epochs_times_as_fast']:.1f}x",
            f">= {twenty:g}x",
            f"{figure['largest_gradient_difference']:.1e}",
        )
    return rows


if __name__ == "__main__":
    main()
