"""From a trained model to a folder that plain transformers loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

UNFINISHED = ".model.unfinished"
LORA = "lora"


def with_lora(model: Any, rank: int, seed: int) -> Any:
    """Low-rank matrices on every linear layer but the head; they alone are trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(seed)
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, settings)


def save_stock_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model beside its place, then move it there file by file. LoRA matrices are merged,
    and saved by themselves as well."""
    unfinished = folder / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(folder / LORA)
        model = model.merge_and_unload()
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    for path in unfinished.iterdir():
        os.replace(path, folder / path.name)
    unfinished.rmdir()
