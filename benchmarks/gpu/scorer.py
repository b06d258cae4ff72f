"""Is the [CPX] scorer right in bf16 on this device, and can its step be captured in a CUDA graph?

The reference is the same scorer on the same base in fp32. Attached, it changes no bit of the base;
generation gives the tokens of plain generation; and the gradient on stored prefixes is that of the
prompts run as a whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from benchmarks.gpu.engines import ROUNDING, difference
from benchmarks.gpu.models import build, compiled, random_ids, why_no_attention
from benchmarks.gpu.rows import Keep
from benchmarks.harness import interleaved
from pliant.complexity import Complexity, CPXConfig, attach, remember

SCORERS: dict[str, dict[str, Any]] = {
    "one row": {},
    "four rows, LoRA": {"rows": 4, "aggregation": "mean", "lora_rank": 4},
    "middle layer": {"layer": 1},
}
CLOSE = 0.1
"""Of the logits, relative to their norm in fp32."""
NEW = 8


def check(settings: dict[str, Any], device: str, keep: Keep) -> None:
    attention = settings.get("attention", "sdpa")
    if reason := why_no_attention(attention, device):
        keep("all", {"skipped": reason})
        return
    for name in settings.get("scorers", SCORERS):
        model = build(settings, device).requires_grad_(False)
        wide = copy.deepcopy(model).float()
        model.set_attn_implementation(attention)
        prompts = random_ids(model, settings["batch"], settings["length"])
        config, eager = CPXConfig(**SCORERS[name]), "compiled" not in settings
        if eager:
            keep(f"{name}, neutral", neutral(model, config, prompts))
        ours, twin = trained(model, config), trained(wide, config)
        twin.load_state_dict(ours.state_dict())
        compiled(model, settings)
        keep(f"{name}, score", scores(ours, twin, prompts))
        keep(f"{name}, gradient", gradient(ours, twin, prompts))
        if eager:  # it would compile anew for each length
            keep(f"{name}, generate", generates(ours, prompts))


def trained(model: PreTrainedModel, config: CPXConfig) -> Complexity:
    """A scorer whose parameters are not at their start."""
    torch.manual_seed(2)
    scorer = attach(model, config)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return scorer


@torch.no_grad()
def neutral(model: PreTrainedModel, config: CPXConfig, ids: Tensor) -> dict[str, Any]:
    """Attached and idle, it changes no bit."""
    before = model(input_ids=ids).logits
    scorer = attach(model, config)
    attached = model(input_ids=ids).logits
    scorer.detach()
    detached = model(input_ids=ids).logits
    return {"passed": torch.equal(before, attached) and torch.equal(before, detached)}


def scores(ours: Complexity, twin: Complexity, prompts: Tensor) -> dict[str, Any]:
    """Of prompts of several lengths, against fp32; and again as a step on their prefill."""
    ragged = [row[: len(row) - 5 * i].tolist() for i, row in enumerate(prompts)]
    expected = torch.tensor(twin.score(ragged).logits)
    at_once = torch.tensor(ours.score(ragged).logits)
    with torch.no_grad():
        full = torch.tensor(twin.score(prompts.tolist()).logits)
        step = ours.logits_of(ours.prefilled(prompts)).double().cpu()
    figures = {"at once": difference(at_once, expected), "as a step": difference(step, full)}
    return {**figures, "passed": max(figures.values()) <= CLOSE}


def generates(scorer: Complexity, prompts: Tensor) -> dict[str, Any]:
    """The tokens of plain generation, and the score of `score`, from one prefill."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompts)
    mask[0, :7] = 0  # padded on the left, as a batch for generation is
    plain = scorer.base.generate(prompts, attention_mask=mask, **options)
    output = scorer.generate(prompts, attention_mask=mask, **options)
    expected = scorer.score(prompts, attention_mask=mask).logits
    off = np.abs(output.scores.logits - expected).max() / np.abs(expected).max()
    same = all(
        ours is not None and torch.equal(ours[-NEW:], theirs[-NEW:])
        for ours, theirs in zip(output.sequences, plain, strict=True)
    )
    figures = {"tokens identical": same, "prefilled again": output.prefilled_again}
    return {
        **figures,
        "score": float(off),
        "passed": bool(same and not output.prefilled_again and off <= CLOSE),
    }


def gradient(ours: Complexity, twin: Complexity, prompts: Tensor) -> dict[str, Any]:
    """On stored prefixes, and with the prompts run as a whole, both against fp32."""
    labels = torch.ones(len(prompts), 1, device=prompts.device)
    mask = torch.ones_like(prompts)
    store = remember(ours, prompts.tolist()).with_capacity(ours.config.rows)

    def on_prefixes() -> Tensor:
        batch = store.batch(range(len(prompts)))
        moved = tuple(tensor.to(prompts.device) for tensor in batch.tensors)
        return ours.logits_of(replace(batch, tensors=moved).to_prefilled(ours))

    exact = _gradient(twin, lambda: twin.logits(prompts, mask, whole=True), labels)
    own = _gradient(ours, lambda: ours.logits(prompts, mask, whole=True), labels)
    stored = _gradient(ours, on_prefixes, labels)
    figures = {"stored": difference(stored, exact), "whole": difference(own, exact)}
    return {**figures, "passed": figures["stored"] <= ROUNDING * figures["whole"] + 0.01}


def _gradient(scorer: Complexity, logits: Callable[[], Tensor], labels: Tensor) -> Tensor:
    scorer.zero_grad(set_to_none=True)
    F.binary_cross_entropy_with_logits(logits(), labels).backward()
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in scorer.parameters()]
    return torch.cat([part.flatten().float() for part in parts])


# --- CUDA graphs ---------------------------------------------------------------------------------


def graph(settings: dict[str, Any], device: str, keep: Keep) -> None:
    """Whether the scoring step on a prefilled prompt can be captured, beside the plain model."""
    model = build(settings, device).requires_grad_(False)
    prompts = random_ids(model, settings["batch"], settings["length"])
    scorer = trained(model, CPXConfig())
    prefilled = scorer.prefilled(prompts)
    runs = {
        "the plain model": lambda: model(input_ids=prompts, use_cache=False).logits[:, -1],
        "the scoring step": lambda: scorer.logits_of(prefilled),
    }
    for name, run in runs.items():
        with torch.no_grad():
            expected = run()
            if device != "cuda":
                keep(name, {"skipped": "CUDA graphs need CUDA", "shape": list(expected.shape)})
                continue
            keep(name, captured(run, expected))


def captured(run: Callable[[], Tensor], expected: Tensor) -> dict[str, Any]:
    """Capture and replay; where that fails, the reason (it is no failure of the row)."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            output = run()
    except RuntimeError as error:
        return {"captured": False, "reason": " ".join(str(error).split())[:300]}
    graph.replay()
    torch.cuda.synchronize()
    off = difference(output, expected)
    times = interleaved({"replayed": graph.replay, "eager": run}, rounds=15)
    return {
        "captured": True,
        "difference": off,
        "times as fast": times["eager"].ratio_to(times["replayed"]).as_dict(),
        "passed": off <= CLOSE,
    }
