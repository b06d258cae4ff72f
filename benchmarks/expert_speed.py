"""What experts cost: a training step, switching, eight of them in one batch, and their bases.

    python -m benchmarks.expert_speed [--rounds 9] [--only step basis switch rows]

`step`: forward and backward of one projection on eight batches of 2,048 tokens, then a change of z,
after which the weight is folded anew; beside the frozen projection, LoRA of rank 16, and the weight
rebuilt from U, S and V at each forward. `one batch` changes z after each batch. `basis`: beside
`torch.linalg.svd`. `switch`: another expert on a model of 110M geometry, beside what the published
code does, (U * s z) @ V, and merging a LoRA. `rows`: decoding a batch of eight, each row with an
expert of its own, beside the base and eight LoRAs of rank 16 (peft's `adapter_names`). Times are
process time on one thread, interleaved.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Times, interleaved, keep
from pliant.experts import SVFConfig
from pliant.experts.basis import decompose, side_of
from pliant.experts.config import Form
from pliant.experts.linear import SVFLinear
from pliant.experts.model import svf_layers
from pliant.reports.tables import Table

TOKENS, BATCHES = 2_048, 8
SHAPES = {"square": (1_024, 1_024), "4:1": (4_096, 1_024)}
EXPERTS, NEW = 8, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures: dict[str, Any] = {}
    for name in options.only:
        figures[name] = MEASURES[name](options.rounds)
        table(name, figures[name]).draw(Console())
    if options.only == list(MEASURES):
        keep("expert_speed", figures, "python -m benchmarks.expert_speed")


# --- a training step -----------------------------------------------------------------------------


def step(rounds: int) -> dict[str, Any]:
    figures = {}
    for shape, (outputs, inputs) in SHAPES.items():
        x = torch.randn(1, TOKENS, inputs, requires_grad=True)
        dy = torch.randn(1, TOKENS, outputs)
        base = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        layers: dict[str, nn.Module] = {
            "frozen": base,
            "LoRA of rank 16": lora(base),
            "rebuilt from U S V": Rebuilt(base),
            "folded": expert(base, "folded"),
            "folded, a quarter of the rank": expert(base, "folded", inputs // 4),
            "delta": expert(base, "delta"),
            "delta, rank 64": expert(base, "delta", 64),
        }
        for what, batches in {shape: BATCHES, f"{shape}, one batch": 1}.items():
            runs = {name: _step(layer, x, dy, batches) for name, layer in layers.items()}
            figures[what] = ratios(timed(runs, rounds), "frozen")
    return figures


def _step(layer: nn.Module, x: Tensor, dy: Tensor, batches: int) -> Callable[[], None]:
    own = [p for p in layer.parameters() if p.requires_grad]

    def run() -> None:
        for _ in range(batches):
            layer(x).backward(dy)
        for parameter in own:
            with torch.no_grad():
                parameter.add_(parameter.grad, alpha=-1e-6)  # so that the weight is folded anew
            parameter.grad = None
        x.grad = None

    return run


def expert(base: nn.Linear, form: Form, rank: int | None = None) -> SVFLinear:
    layer = SVFLinear(base, "own", SVFConfig(form=form, rank=rank))
    nn.init.normal_(layer.changes()["own"], std=0.1)
    layer.ensure_basis()
    return layer


def lora(base: nn.Linear) -> nn.Module:
    model = get_peft_model(nn.Sequential(base), LoraConfig(r=16, target_modules=["0"]))
    return model.base_model.model[0]


class Rebuilt(nn.Module):
    """U diag(s z) V^T at each forward, by autograd."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        u, s, vt = torch.linalg.svd(base.weight, full_matrices=False)
        self.u, self.s, self.vt = (nn.Parameter(t, requires_grad=False) for t in (u, s, vt))
        self.z = nn.Parameter(torch.ones_like(s))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.u * (self.s * self.z)) @ self.vt)


# --- bases ---------------------------------------------------------------------------------------


def basis(rounds: int) -> dict[str, Any]:
    figures = {}
    for shape, size in SHAPES.items():
        weight = torch.randn(size)
        runs: dict[str, Callable[[], Any]] = {
            "torch.linalg.svd": partial(torch.linalg.svd, weight, full_matrices=False),
            "eigh of the Gram matrix": partial(decompose, weight, min(size)),
        }
        times = timed(runs, min(rounds, 5))
        u, _, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        exact = vt.T if side_of(*size) == "input" else u
        cosine = (decompose(weight, min(size)).vectors.double() * exact).sum(0).abs()
        figures[shape] = {
            **ratios(times, "torch.linalg.svd"),
            "vectors with a cosine below .999 to the SVD's in fp64": int((cosine < 0.999).sum()),
        }
    return figures


# --- switching -----------------------------------------------------------------------------------


@torch.no_grad()
def switch(rounds: int) -> dict[str, Any]:
    """On GPT-2's geometry: 12 layers of 768."""
    model = GPT2LMHeadModel(GPT2Config()).eval()
    decomposed = {}
    for block in model.transformer.h:
        for projection in (block.mlp.c_fc, block.mlp.c_proj, block.attn.c_attn, block.attn.c_proj):
            u, s, vt = torch.linalg.svd(projection.weight, full_matrices=False)
            decomposed[projection] = (u, s, vt, [torch.rand_like(s) + 0.5 for _ in range(2)])
    turn = {"rebuild": 0, "expert": 0, "lora": 0}

    def rebuild() -> None:
        turn["rebuild"] ^= 1
        for projection, (u, s, vt, z) in decomposed.items():
            projection.weight.copy_((u * (s * z[turn["rebuild"]])) @ vt)

    adapted = get_peft_model(GPT2LMHeadModel(GPT2Config()), SVFConfig(), adapter_name="0").eval()
    adapted.add_adapter("1", SVFConfig())

    def choose() -> None:
        turn["expert"] ^= 1
        adapted.set_adapter(str(turn["expert"]))

    config = LoraConfig(r=16, target_modules=["c_fc", "c_proj", "c_attn"], fan_in_fan_out=True)
    merged = get_peft_model(GPT2LMHeadModel(GPT2Config()), config, adapter_name="0").eval()
    merged.add_adapter("1", config)

    def merge() -> None:
        turn["lora"] ^= 1
        if merged.base_model.merged_adapters_seen:
            merged.unmerge_adapter()
        merged.base_model.merged_adapters_seen = True
        merged.merge_adapter([str(turn["lora"])])

    merged.base_model.merged_adapters_seen = False
    times = timed({"rebuild": rebuild, "merged LoRA": merge, "expert": choose}, rounds)
    numbers = sum(layer.changes()["0"].numel() for _, layer in svf_layers(adapted))
    return {
        **{f"{name}, ms": 1000 * own.median for name, own in times.items()},
        "rebuild / expert": times["rebuild"].ratio_to(times["expert"]).median,
        "merged LoRA / expert": times["merged LoRA"].ratio_to(times["expert"]).median,
        "an expert, MB": 4 * numbers / 1e6,
    }


# --- rows ----------------------------------------------------------------------------------------


@torch.no_grad()
def rows(rounds: int) -> dict[str, Any]:
    """The SmolLM2-135M geometry with a third of its layers, a batch of eight."""
    names = [str(i) for i in range(EXPERTS)]
    models: dict[str, Any] = {
        "base": llama(),
        "eight LoRAs of rank 16": adapted(LoraConfig(r=16, target_modules="all-linear"), names),
        "eight experts": adapted(SVFConfig(), names),
        "eight experts of rank 64": adapted(SVFConfig(rank=64), names),
        "one expert of rank 64 for all": adapted(SVFConfig(rank=64), names[:1]),
        "eight of 64 experts of rank 64": adapted(SVFConfig(rank=64), [str(i) for i in range(64)]),
    }
    ids = torch.randint(5, 900, (EXPERTS, 32))
    own = {"base": {}, "one expert of rank 64 for all": {}}
    runs = {
        name: _decode(model, ids, own.get(name, {"adapter_names": names}))
        for name, model in models.items()
    }
    times = timed(runs, rounds)
    alone = times["one expert of rank 64 for all"]
    many = times["eight of 64 experts of rank 64"].ratio_to(times["eight experts of rank 64"])
    return {
        **ratios(times, "base"),
        "eight of 64 / eight of eight": many.as_dict(),
        "eight of rank 64 / one": times["eight experts of rank 64"].ratio_to(alone).as_dict(),
    }


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1_536, "num_hidden_layers": 10}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 1_000}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def adapted(config: Any, names: list[str]) -> Any:
    model = get_peft_model(llama(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, type(config)(**_fresh(config)))
    for name, parameter in model.named_parameters():
        if "svf_z" in name or "lora_" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False)


def _fresh(config: Any) -> dict[str, Any]:
    if isinstance(config, SVFConfig):
        return {"rank": config.rank}
    return {"r": config.r, "target_modules": "all-linear"}


def _decode(model: Any, ids: Tensor, options: dict[str, Any]) -> Callable[[], Any]:
    steps = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(input_ids=ids, **steps, **options)


# --- what is printed -----------------------------------------------------------------------------


def timed(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Times]:
    return interleaved(runs, rounds=rounds, clock=time.process_time)


def ratios(times: dict[str, Times], control: str) -> dict[str, Any]:
    return {name: own.ratio_to(times[control]).as_dict() for name, own in times.items()}


def table(name: str, figures: dict[str, Any]) -> Table:
    lines = []
    for key, value in figures.items():
        if isinstance(value, dict) and "median" not in value:
            lines += [(f"{key}: {inner}", _shown(own)) for inner, own in value.items()]
        else:
            lines.append((key, _shown(value)))
    return Table(name, ("", "relative, or as named"), lines)


def _shown(value: Any) -> str:
    return f"{value['median']:.3f}" if isinstance(value, dict) else f"{value:.3g}"


MEASURES = {"step": step, "basis": basis, "switch": switch, "rows": rows}

if __name__ == "__main__":
    main()
