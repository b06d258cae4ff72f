"""Run by itself: attached beside Liger's kernels, on a GPU, or on a CPU in triton's interpreter.

The interpreter has no float arguments and nothing of libdevice: both are given to it here, and the
kernels themselves are Liger's own.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported

import numpy as np
import triton.language as tl
from liger_kernel.ops import rms_norm
from liger_kernel.transformers import _apply_liger_kernel_to_instance
from tests.gradients.test_training import history, padded, rows, trainer
from tests.minimal_adapter import tiny_llama
from triton.runtime import interpreter

from pliant.gradients import GradientConfig, GradientsWarning, attach
from pliant.gradients.training import make_selective

OUT = Path(sys.argv[1])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIGS = {
    "every": GradientConfig(engine="exact", selection="all"),
    "exact": GradientConfig(engine="exact", selection="topk", ratio=0.4),
    "sparse": GradientConfig(selection="topk", ratio=0.4),
    "one hop": GradientConfig(selection="topk", ratio=0.4, kv_grad="one_hop"),
    "completion": GradientConfig(engine="completion"),
}


def complete_interpreter() -> None:
    before = interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        if isinstance(value, float):
            handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return before(value)

    interpreter._implicit_cvt = converted
    rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)


def made(liger: bool) -> Any:
    model = tiny_llama().to(DEVICE).train()
    if liger:
        _apply_liger_kernel_to_instance(model=model)
    return model


def learned(model: Any, **more: Any) -> tuple[float, list[torch.Tensor]]:
    batch = {key: value.to(DEVICE) for key, value in padded(rows(3)).items()}
    loss = model(**batch, **more).loss
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters()]


def close(one: tuple[float, list[torch.Tensor]], other: tuple[float, list[torch.Tensor]]) -> bool:
    grads = zip(one[1], other[1], strict=True)
    return abs(one[0] - other[0]) < 1e-5 and all(torch.allclose(a, b, atol=1e-6) for a, b in grads)


def chosen_by(config: GradientConfig, model: Any) -> tuple[Any, Any]:
    gradients = attach(model, config)
    return gradients, learned(model)


def trained(liger: bool) -> Any:
    run = trainer(
        tiny_llama(),
        OUT / "run",
        use_liger_kernel=liger,
        max_steps=2,
        gradient_accumulation_steps=2,
        use_cpu=DEVICE == "cpu",
    )
    make_selective(run, CONFIGS["sparse"])
    run.train()
    return run


def beside(name: str, config: GradientConfig, expected: Any) -> dict[str, bool]:
    gradients, ours = chosen_by(config, made(liger=True))
    late = made(liger=False)
    attach(late, config)
    _apply_liger_kernel_to_instance(model=late)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", GradientsWarning)
        learned(late)
    told = [str(one.message) for one in said if one.category is GradientsWarning]
    return {
        f"{name}: as without Liger": close(ours, expected),
        f"{name}: by {config.engine}": gradients.engine == config.engine,
        f"{name}: put in our place, it is noticed": "trained past its forward" in told[0],
    }


if __name__ == "__main__":
    # Liger puts its rotation into transformers' own module: what is without it comes first.
    plain = learned(made(liger=False))
    expected = {name: chosen_by(config, made(liger=False))[1] for name, config in CONFIGS.items()}
    before = trained(liger=False)
    if DEVICE == "cpu":
        complete_interpreter()
    found = {"Liger itself": close(learned(made(liger=True)), plain)}
    for name, config in CONFIGS.items():
        found |= beside(name, config, expected[name])
    after = trained(liger=True)
    losses = zip(history(before, "loss"), history(after, "loss"), strict=True)
    found["Trainer: as without Liger"] = all(abs(a - b) < 1e-5 for a, b in losses)
    found["Trainer: by sparse"] = after.model.pliant.gradients.engine == "sparse"
    found["Trainer: its kernels stay"] = "liger" in after.model.model.norm.forward.__module__
    (OUT / "liger.json").write_text(json.dumps(found))
