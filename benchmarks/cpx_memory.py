"""The memory that training a scorer needs besides the model: weights, gradients and Adam's states.

    python -m benchmarks.cpx_memory

Computed for Mistral-7B's geometry on the meta device (no weight is allocated), and measured on a
medium-sized model after one step of each. The control is the seeds' loop: its optimizer holds the
embedding matrix, so its gradient and both of Adam's states are as large as the vocabulary.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM, PrinterCallback

from benchmarks.cpx_training import sizes
from benchmarks.harness import keep
from benchmarks.seed_loop import SeedLoop
from pliant.complexity import CPXConfig, attach
from pliant.complexity.model import Complexity
from pliant.complexity.training.config import CPXTrainingConfig
from pliant.complexity.training.dataset import PromptDataset
from pliant.complexity.training.trainer import CPXTrainer

COMMAND = "python -m benchmarks.cpx_memory"
COPIES = 4  # weight, gradient, and Adam's two states
TARGET = 140_000  # bytes


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    figures = {"mistral_7b": mistral(), "measured": measured()}
    Console().print(table(figures))
    keep("cpx_memory", figures, COMMAND)


def mistral() -> dict[str, Any]:
    """MistralConfig's defaults are the 7B model's sizes; the seeds load it in bf16."""
    config = MistralConfig()
    with torch.device("meta"):
        model = MistralForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    table = model.get_input_embeddings().weight
    scorer = Complexity(model, CPXConfig())
    ours = sum(p.numel() * p.element_size() for p in scorer.parameters())
    rows = table.numel() + table.shape[1]  # and one more, for [CPX]
    head = table.shape[1] + 1
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_numbers": sum(p.numel() for p in scorer.parameters()),
        "ours_bytes": COPIES * ours,
        "control_bytes_bf16": COPIES * (rows * 2 + head * 4),
        "control_bytes_fp32": COPIES * (rows + head) * 4,
    }


def measured() -> dict[str, Any]:
    """The bytes in both optimizers after a step."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(sizes()).eval()
    control = SeedLoop(copy.deepcopy(model))
    scorer = attach(model.requires_grad_(False), CPXConfig())
    ids = torch.randint(0, sizes().vocab_size, (4, 16))
    labels = torch.ones(4, 1)
    control.logits(ids).sum().backward()
    control.optimizer.step()
    return {
        "parameters": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "trainable_numbers": sum(p.numel() for p in scorer.parameters()),
        "ours_bytes": stepped(scorer, PromptDataset(tuple(ids), labels)),
        "control_bytes_fp32": control.trainable_bytes(),
    }


def stepped(scorer: nn.Module, dataset: PromptDataset) -> int:
    """The bytes that our training holds; hooks record the gradients."""
    gradients: dict[str, Tensor] = {}
    for name, p in scorer.named_parameters():
        p.register_hook(partial(gradients.__setitem__, name))
    config = CPXTrainingConfig(batch_size=4, num_epochs=1, prefixes="memory")
    args = config.training_arguments(use_cpu=True, disable_tqdm=True, logging_strategy="no")
    trainer = CPXTrainer(scorer, args, config=config, train_dataset=dataset)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    states = [t for state in trainer.optimizer.state.values() for t in state.values()]
    matrices = [t for t in states if isinstance(t, Tensor) and t.dim()]
    return sum(t.numel() * t.element_size() for t in [*held, *gradients.values(), *matrices])


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e3:,.1f} KB"


def table(figures: dict[str, Any]) -> Table:
    rows = Table("model", "trained numbers", "ours", "target", "the seeds' loop", "times less")
    for name, figure in figures.items():
        control = figure.get("control_bytes_bf16", figure["control_bytes_fp32"])
        rows.add_row(
            f"{name}, {figure['parameters']:,} parameters",
            f"{figure['trainable_numbers']:,}",
            size(figure["ours_bytes"]),
            f"<= {size(TARGET)}",
            size(control),
            f"{control / figure['ours_bytes']:,.0f}",
        )
    return rows


if __name__ == "__main__":
    main()
