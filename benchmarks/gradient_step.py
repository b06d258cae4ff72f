"""The time and memory of a step of selective training, beside standard training and others.

    python -m benchmarks.gradient_step [--rounds 3] [--quick]
    python -m benchmarks.gradient_step --model smollm2-135m

An 8-layer Llama (hidden 256), vocabularies of 8k and 32k, sequences of 256 and 1,024 tokens. Times
are process time on one thread, interleaved, as ratios to standard training in the same round.
Memory is the peak that a step adds to its own process (its resident set, with freed memory returned
at once), with the parameters' gradients and without them: these are held whichever tokens train.
A real model trains on the documentation, in rows of 512 and 1,024 tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import real_model
from benchmarks.harness import interleaved, keep
from pliant.gradients import GradientConfig, attach

SETTINGS = ((8192, 256, 8), (32768, 256, 4), (8192, 1024, 2), (32768, 1024, 1))
"""Vocabulary, tokens of a sequence, sequences."""
OURS: dict[str, dict[str, Any]] = {
    "sparse .25": {"ratio": 0.25},
    "sparse .25, whole vocabulary": {"ratio": 0.25, "score_share": 1.0},
    "sparse .25, uniform": {"ratio": 0.25, "selection": "uniform"},
    "sparse .25, one hop": {"ratio": 0.25, "kv_grad": "one_hop"},
    "sparse .10": {"ratio": 0.10},
    "sparse .50": {"ratio": 0.50},
    "exact .25": {"ratio": 0.25, "engine": "exact"},
    "exact .25, whole vocabulary": {"ratio": 0.25, "engine": "exact", "score_share": 1.0},
    "exact .25, uniform": {"ratio": 0.25, "engine": "exact", "selection": "uniform"},
}
OFF = "attached, switched off"
OTHERS = (
    "standard",
    "a quarter of the sequences",
    "trl's fused head",
    "CGGRModel",
    "CGGRLoss",
)
COMPLETION = ("completion (20 %)", "standard on the same")
NAMES = (*OTHERS, *OURS, *COMPLETION)
REAL_SETTINGS = ((512, 4), (1024, 2))
"""Tokens of a sequence, sequences."""
REAL_NAMES = (
    "standard",
    "a quarter of the sequences",
    "CGGRModel",
    "CGGRLoss",
    "sparse .25",
    "sparse .25, whole vocabulary",
    "exact .25",
)
Setting = tuple[str, int, int]
"""A vocabulary's size or a real model's name, the tokens of a sequence, the sequences."""
Step = Callable[[], None]


def main() -> None:
    options = _options()
    if options.peak:
        model, length, rows = options.setting
        print(json.dumps(peak_of(options.peak, (model, int(length), int(rows)))))
        return
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    if not options.model:
        figures["switched off"] = switched_off()
        Console().print(f"{OFF}: {figures['switched off']['median']:.3f} times a standard step")
    for setting in track(_settings(options), "settings"):
        figures[_title(setting)] = measured(setting, options.rounds)
        show(setting, figures[_title(setting)])
    name = real_model.result_name("gradient_step", options.model)
    keep(name, figures, real_model.command("gradient_step", options.model))


def _settings(options: argparse.Namespace) -> list[Setting]:
    settings: list[Setting] = [(str(words), *rest) for words, *rest in SETTINGS]
    if options.model:
        settings = [(options.model, *rest) for rest in REAL_SETTINGS]
    return settings[:1] if options.quick else settings


def _is_real(setting: Setting) -> bool:
    return not setting[0].isdigit()


def measured(setting: Setting, rounds: int) -> dict[str, Any]:
    """Every contender's time and memory, relative to standard training's."""
    steps = {name: step_of(name, setting) for name in (REAL_NAMES if _is_real(setting) else NAMES)}
    usable = {name: step for name, step in steps.items() if step is not None}
    times = interleaved(usable, rounds=rounds, clock=time.process_time)
    bytes_of = {name: _peak_in_a_process(name, setting) for name in usable}
    figures = {}
    held = _gradient_bytes(setting)
    for name in usable:
        control = COMPLETION[1] if name == COMPLETION[0] else "standard"
        figures[name] = {
            "speed": times[control].ratio_to(times[name]).as_dict(),
            "seconds": times[name].median,
            "memory": bytes_of[name] / bytes_of[control],
            "memory without gradients": (bytes_of[name] - held) / (bytes_of[control] - held),
            "mebibytes": bytes_of[name] / 2**20,
        }
    return figures


def switched_off(rounds: int = 15) -> dict[str, float]:
    """The time of a step with the adapter attached but disabled, relative to a standard one. It is
    measured separately, because other contenders disturb such a small difference."""
    setting = (str(SETTINGS[0][0]), SETTINGS[0][1], 2)
    steps = {"standard": step_of("standard", setting), OFF: step_of(OFF, setting)}
    times = interleaved({k: v for k, v in steps.items() if v}, rounds, clock=time.process_time)
    return times[OFF].ratio_to(times["standard"]).as_dict()


def step_of(name: str, setting: Setting) -> Step | None:
    """Forward and backward of one batch; None if its library is not installed."""
    model = _model(setting)
    ids = _ids(setting)
    if name in OURS:
        attach(model, GradientConfig(**OURS[name]))
    elif name == OFF:
        return _switched_off(model, ids)
    elif name == "CGGRModel":
        return _cggr_model(model, ids)
    elif name == "CGGRLoss":
        return _cggr_loss(model, ids)
    elif name == "trl's fused head":
        return _fused(model, ids)
    elif name == "a quarter of the sequences":
        ids = ids[: max(1, len(ids) // 4)]
    labels = ids.clone()
    if name in COMPLETION:
        labels[:, : int(0.8 * labels.shape[1])] = -100
        if name == COMPLETION[0]:
            attach(model, GradientConfig(engine="completion"))
    return lambda: _backward(model, model(input_ids=ids, labels=labels).loss)


def peak_of(name: str, setting: Setting) -> int:
    """Bytes that a step adds to this process, after one step on short sequences."""
    torch.set_num_threads(1)
    warm = step_of(name, (setting[0], 16, 8))
    assert warm is not None
    warm()
    del warm
    gc.collect()
    step = step_of(name, setting)
    assert step is not None
    before = _resident()
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the peak counts anew from here
    step()
    return _peak_resident() - before


def _gradient_bytes(setting: Setting) -> int:
    return sum(p.numel() * p.element_size() for p in _model(setting).parameters())


def show(setting: Setting, figures: dict[str, Any]) -> None:
    table = Table(title=f"a step, {_title(setting)}")
    for column in ("", "speed", "quartiles", "theory", "memory", "less gradients", "MiB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, values in figures.items():
        speed = values["speed"]
        low, high = speed.get("lower_quartile"), speed.get("upper_quartile")
        spread = f"{low:.2f}-{high:.2f}" if low is not None else ""
        row = (name, f"{speed['median']:.2f}x", spread, _theory(name))
        memory = (f"{values[k]:.2f}x" for k in ("memory", "memory without gradients"))
        table.add_row(*row, *memory, f"{values['mebibytes']:.0f}")
    Console().print(table)


def _theory(name: str) -> str:
    """For the backbone alone, without the cost of scores."""
    ratio = OURS.get(name, {}).get("ratio")
    if ratio is None or not name.startswith("sparse"):
        return {COMPLETION[0]: f"{3 / 1.4:.2f}x"}.get(name, "")
    return f"{3 / (1 + 3 * ratio):.2f}x"


def _backward(model: torch.nn.Module, loss: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    loss.backward()


def _switched_off(model: Any, ids: torch.Tensor) -> Step:
    gradients = attach(model, GradientConfig())

    def step() -> None:
        with gradients.disabled():
            loss = model(input_ids=ids, labels=ids).loss
        _backward(model, loss)

    return step


def _cggr_model(model: Any, ids: torch.Tensor) -> Step | None:
    """In its steady state: the warm-up is over."""
    try:
        from cggr import CGGRModel, create_truncated_router
    except ImportError:
        return None
    router = create_truncated_router(model, num_layers=4)
    theirs = CGGRModel(model, router=router, min_tokens_ratio=0.25, warmup_steps=1)
    theirs.train()
    theirs.step()
    theirs.step()
    return lambda: _backward(model, theirs(ids, labels=ids))


def _cggr_loss(model: Any, ids: torch.Tensor) -> Step | None:
    try:
        from cggr import CGGRLoss
    except ImportError:
        return None
    criterion = CGGRLoss(min_tokens_ratio=0.25, warmup_steps=1)
    criterion.step()
    criterion.step()

    def step() -> None:
        logits = model(input_ids=ids).logits
        _backward(model, criterion(logits, ids.roll(-1, 1)))

    return step


def _fused(model: Any, ids: torch.Tensor) -> Step | None:
    """The head as trl's trainers run it: every token, in tiles that are recomputed."""
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:
        return None
    add_fused_lm_head(model)
    return lambda: _backward(model, model(input_ids=ids, labels=ids, fused_lm_head=True).loss)


def _model(setting: Setting) -> Any:
    if _is_real(setting):
        return real_model.real_model(setting[0]).requires_grad_(True).train()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=int(setting[0]),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).train()


def _ids(setting: Setting) -> torch.Tensor:
    if _is_real(setting):
        return real_model.prompts(setting[0], setting[2], setting[1])
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, int(setting[0]), (setting[2], setting[1]), generator=generator)


RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Freed memory leaves the process at once, so that the peak is that of live tensors."""


def _peak_in_a_process(name: str, setting: Setting) -> int:
    command = [sys.executable, "-m", "benchmarks.gradient_step", "--peak", name, "--setting"]
    process = subprocess.run(
        [*command, *map(str, setting)],
        env=os.environ | RETURN_MEMORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(process.stdout.strip().splitlines()[-1])


def _resident() -> int:
    return _status("VmRSS")


def _peak_resident() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        line = next(line for line in lines if line.startswith(name))
    return int(line.split()[1]) * 1024


def _title(setting: Setting) -> str:
    what = Path(setting[0]).name if _is_real(setting) else f"vocabulary {setting[0]}"
    return f"{what}, {setting[2]} x {setting[1]} tokens"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the first setting alone")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--setting", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--model", help="a real model, by name or folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
