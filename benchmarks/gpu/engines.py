"""Is selective training right in bf16 on this device? Every engine against the plain model.

The reference is the plain model's loss on the tokens that the engine chose, with their weights. The
engines "sparse" and "completion" leave the gradient out of other tokens' keys and values, and so
does their reference. In fp32 both agree to rounding. In bf16 the yardstick is the plain model's own
rounding: how much its bf16 gradient differs from the fp32 one.

B sequences of T positions.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.models import build, compiled, random_ids, why_no_attention
from benchmarks.gpu.rows import Keep
from pliant.gradients import GradientConfig, Gradients, attach

ENGINES: dict[str, dict[str, Any]] = {
    "sparse": {"engine": "sparse", "ratio": 0.25},
    "sparse, uniform": {"engine": "sparse", "ratio": 0.25, "selection": "uniform"},
    "exact": {"engine": "exact", "ratio": 0.25},
    "completion": {"engine": "completion"},
}
CLOSE_FP32 = 1e-3
ROUNDING = 1.5
"""In bf16, up to this many times the plain model's own rounding (and a hundredth) is right: the
engines run other kernels, which round in another order."""
IGNORED = -100


def check(settings: dict[str, Any], device: str, keep: Keep) -> None:
    attention = settings.get("attention", "sdpa")
    if reason := why_no_attention(attention, device):
        keep("all", {"skipped": reason})
        return
    model = build(settings, device).train()
    plain, wide = copy.deepcopy(model), copy.deepcopy(model).float()
    plain.set_attn_implementation(attention)
    model.set_attn_implementation(attention)
    trained = compiled(model, settings)
    for name in settings.get("engines", ENGINES):
        config = GradientConfig(**ENGINES[name])
        batch = labelled(model, settings, config.engine)
        keep(f"{name}, bf16", agreement(trained, plain, wide, batch, config))
        if "compiled" not in settings and attention == "sdpa":
            keep(f"{name}, fp32", agreement(wide, wide, wide, batch, config))


def agreement(
    model: nn.Module,
    plain: nn.Module,
    wide: nn.Module,
    batch: dict[str, Tensor],
    config: GradientConfig,
) -> dict[str, Any]:
    """How much loss and gradient differ from the fp32 model's, and the plain model's beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fallback is reported below
        gradients = attach(model, config)
        choices = recorded(gradients)
        loss, gradient = backward(model, model(use_cache=False, **batch).loss)
        engine = gradients.engine
        gradients.detach()
    weights_BT = chosen_weights(batch, choices)
    alone = config.engine != "exact"
    exact_loss, exact = reference(wide, batch, weights_BT, alone)
    plain_loss, own = reference(plain, batch, weights_BT, alone)
    fp32 = next(model.parameters()).dtype == torch.float32
    figures = {
        "loss": abs(loss - exact_loss) / abs(exact_loss),
        "loss, plain model": abs(plain_loss - exact_loss) / abs(exact_loss),
        "gradient": difference(gradient, exact),
        "gradient, plain model": difference(own, exact),
        "chosen tokens": int((weights_BT > 0).sum()),
        "engine": engine,
    }
    allowed = CLOSE_FP32 if fp32 else ROUNDING * figures["gradient, plain model"] + 0.01
    close = figures["gradient"] <= allowed and figures["loss"] <= (CLOSE_FP32 if fp32 else 0.02)
    return {**figures, "passed": bool(close and engine == config.engine)}


def labelled(model: Any, settings: dict[str, Any], engine: str) -> dict[str, Tensor]:
    """A batch whose last row is padded on the right; for completions, with a prompt."""
    ids_BT = random_ids(model, settings["batch"], settings["length"])
    batch = {"input_ids": ids_BT, "labels": ids_BT.clone()}
    batch["attention_mask"] = torch.ones_like(ids_BT)
    pads = slice(-settings["length"] // 8, None)
    batch["attention_mask"][-1, pads] = 0
    batch["labels"][-1, pads] = IGNORED
    if engine == "completion":
        batch["labels"][:, : settings["length"] // 2] = IGNORED
    return batch


def recorded(gradients: Gradients) -> list[Any]:
    """What the selector chooses from now on."""
    choices: list[Any] = []
    choose = gradients.selector.chosen

    def chosen(*args: Any) -> Any:
        choices.append(choose(*args))
        return choices[-1]

    gradients.selector.chosen = chosen  # type: ignore[method-assign]
    return choices


def chosen_weights(batch: dict[str, Tensor], choices: list[Any]) -> Tensor:
    """(B, T): each position's weight in the loss, 0 where it was not chosen."""
    valid_BT = targets_of(batch) != IGNORED
    if not choices:  # the completion engine takes all that is labelled
        return valid_BT.float()
    weights_BT = torch.zeros(valid_BT.shape, device=valid_BT.device)
    return weights_BT.scatter_add(1, choices[-1].positions_BK, choices[-1].weights_BK)


def reference(
    model: nn.Module, batch: dict[str, Tensor], weights_BT: Tensor, alone: bool
) -> tuple[float, Tensor]:
    """The plain model's weighted loss and its gradient; `alone`: none into other tokens' keys."""
    targets_BT = targets_of(batch)
    with _gradient_only_at(model, weights_BT > 0) if alone else _as_it_is():
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        logits_BVT = model(**inputs, use_cache=False).logits.float().transpose(1, 2)
        losses_BT = F.cross_entropy(logits_BVT, targets_BT, ignore_index=IGNORED, reduction="none")
        loss = (weights_BT * losses_BT).sum() / (targets_BT != IGNORED).sum()
        return backward(model, loss)


def targets_of(batch: dict[str, Tensor]) -> Tensor:
    return F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)


@contextmanager
def _gradient_only_at(model: nn.Module, chosen_BT: Tensor) -> Iterator[None]:
    """Keys and values of the other positions are detached."""

    def detach(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.where(chosen_BT.unsqueeze(-1), output, output.detach())

    hooks = [
        module.register_forward_hook(detach)
        for name, module in model.named_modules()
        if name.endswith(("k_proj", "v_proj"))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def backward(model: nn.Module, loss: Tensor) -> tuple[float, Tensor]:
    """The loss, and the gradient of all parameters as one vector in fp32."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), torch.cat([part.flatten().float() for part in parts])


def difference(ours: Tensor, reference: Tensor) -> float:
    """The norm of the difference, relative to the reference's."""
    return float((ours.double() - reference.double()).norm() / reference.double().norm())
