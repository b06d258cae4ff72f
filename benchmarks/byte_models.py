"""Small models that benchmarks train on bytes of real text, in a few CPU-minutes.

The texts are those of `benchmarks.structure_prune`. A model is trained once, and then read from the
cache.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.harness import CACHE
from benchmarks.structure_prune import text_of

LENGTH, ROWS = 256, 8
PEAK = 2e-3  # learning rate
TRAIN = ("gsm8k-train.jsonl.gz", "wikitext2-valid.txt.gz")
TESTS = {"gsm8k": "gsm8k-test.jsonl.gz", "wikitext2": "wikitext2-test.txt.gz"}

Pieces = list[dict[str, Tensor]]


def trained(
    name: str, untrained: PreTrainedModel, data: Path, steps: int, **options: Any
) -> tuple[Any, float]:
    """The model after training on as many pieces of each text, and the CPU seconds that took.

    `options` go to every call of the model.
    """
    folder = CACHE / f"{name}-{steps}"
    if not folder.exists():
        seconds = _train(untrained, [bytes_of(data / text) for text in TRAIN], steps, options)
        untrained.save_pretrained(folder)
        (folder / "seconds.txt").write_text(f"{seconds:.0f}")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model.requires_grad_(False), float((folder / "seconds.txt").read_text())


def calibration_pieces(data: Path, count: int) -> Pieces:
    """So many bytes of the training texts, half of them of each."""
    return [batch for text in TRAIN for batch in pieces(bytes_of(data / text), count // 2)]


def test_pieces(data: Path, count: int) -> dict[str, Pieces]:
    """So many bytes of each test text."""
    return {name: pieces(bytes_of(data / text), count) for name, text in TESTS.items()}


def bytes_of(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(text_of(path).encode()), dtype=torch.uint8)


def pieces(ids: Tensor, count: int) -> Pieces:
    rows_BT = ids[: count // LENGTH * LENGTH].long().view(-1, LENGTH)
    return [{"input_ids": batch} for batch in rows_BT.split(ROWS)]


def _train(model: Any, texts: list[Tensor], steps: int, options: dict[str, Any]) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps)
    began = time.process_time()
    for step in range(steps):
        ids_BT = torch.cat([_random_rows(ids, ROWS // len(texts)) for ids in texts])
        loss = model(input_ids=ids_BT, labels=ids_BT, **options).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {float(loss.detach()):.2f}", flush=True)
    return time.process_time() - began


def _random_rows(ids: Tensor, rows: int) -> Tensor:
    starts = torch.randint(len(ids) - LENGTH, (rows,))
    return torch.stack([ids[s : s + LENGTH] for s in starts.tolist()]).long()
