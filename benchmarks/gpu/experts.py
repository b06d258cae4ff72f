"""What experts cost: a training step, decoding a batch with one for each row, and their bases.

Each way is put on the same base, in turn; its control is the base with the adapters disabled. LoRAs
of rank 16 from peft act on the same projections.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from benchmarks.gpu.contest import contest
from benchmarks.gpu.models import build, random_ids
from benchmarks.gpu.rows import Keep
from pliant.experts import SVFConfig

NAMES = [str(i) for i in range(8)]
BASE = "the base"
PROMPT = 32
QUARTER = {"1B": 512, "7B": 1_024}


def measure(settings: dict[str, Any], device: str, keep: Keep) -> None:
    base = build(settings, device).requires_grad_(False)
    base.enable_input_require_grads()
    ids = random_ids(base, settings["batch"], settings["length"])
    for name, config in configs(settings).items():
        began = time.perf_counter()
        model = with_adapters(base, config)
        keep(f"{name}, attaching", {"seconds of eight": time.perf_counter() - began})
        rounds = settings["rounds"]
        if settings["training"]:
            runs = {BASE: disabled(model, step(model, ids)), name: step(model, ids)}
            contest(runs, BASE, rounds, device, _named(keep, f"{name}, training step"))
        prompts = random_ids(base, len(NAMES), PROMPT)
        plain = decoding(model, prompts, settings["new"], {})
        rows = decoding(model, prompts, settings["new"], {"adapter_names": NAMES})
        runs = {BASE: disabled(model, plain), name: rows}
        contest(runs, BASE, rounds, device, _named(keep, f"{name}, decoding"))
        model.unload()


def configs(settings: dict[str, Any]) -> dict[str, Any]:
    quarter = QUARTER.get(settings.get("geometry", ""), 16)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {
        "LoRAs of rank 16": LoraConfig(r=16, target_modules=linear),
        "experts of rank 64": SVFConfig(rank=64),
        "experts, a quarter of the rank": SVFConfig(rank=quarter),
    }


def with_adapters(base: Any, config: Any) -> PeftModel:
    model = get_peft_model(base, config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "svf_z" in name or "lora_" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def disabled(model: PeftModel, run: Callable[[], None]) -> Callable[[], None]:
    def without() -> None:
        with model.disable_adapter():
            run()

    return without


def step(model: PeftModel, ids: Tensor) -> Callable[[], None]:
    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def decoding(
    model: PeftModel, ids: Tensor, new: int, options: dict[str, Any]
) -> Callable[[], None]:
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}

    @torch.no_grad()
    def run() -> None:
        mask = torch.ones_like(ids)
        model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **settings, **options)

    return run


def _named(keep: Keep, what: str) -> Keep:
    return lambda name, figures: keep(what if name != BASE else f"{BASE}, {what}", figures)
