"""CGGRModel: a model that trains on some of its tokens, for training loops without adapters.

    router = create_truncated_router(model, num_layers=4)
    cggr_model = CGGRModel(model, router=router, min_tokens_ratio=0.25)
    loss = cggr_model(input_ids, labels=labels)
    loss.backward()

A facade: `pliant.gradients.attach` does the work, on `cggr_model.model`, which stays itself. For a
Trainer, attach to the model instead (a call of this returns a loss, and no output).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from pliant.adapters import attached
from pliant.gradients.config import Engine, GradientConfig, Score, Selection
from pliant.gradients.facade.loss import logits_of
from pliant.gradients.facade.scorer import TruncatedRouter
from pliant.gradients.model import Gradients, attach
from pliant.gradients.selection.scores import measured
from pliant.gradients.selector import Router


class CGGRModel(nn.Module):
    """Returns the loss of the selected tokens; only these are run backward.

    It is in train mode at first, and so is the model (one that was just loaded is not). In eval
    mode and under `torch.no_grad()` the loss is that of all tokens, as ever.
    """

    def __init__(
        self,
        model: nn.Module,
        router: Router | None = None,
        min_tokens_ratio: float = 0.25,
        warmup_steps: int = 1000,
        dynamic_threshold: bool = True,
        threshold_sensitivity: float = 0.5,
        selection: Selection = "topk",
        scoring: Score = "combined",
        num_strata: int = 4,
        min_tokens_per_sequence: int = 1,
        engine: Engine = "sparse",
    ) -> None:
        """Scores come from the logits of `router`, called as `router(input_ids,
        attention_mask=...)`; without one from the model's own, which the forward makes anyway."""
        super().__init__()
        config = GradientConfig(
            engine=engine,
            ratio=min_tokens_ratio,
            selection=selection,
            score=scoring,
            warmup_steps=warmup_steps,
            dynamic=dynamic_threshold,
            sensitivity=threshold_sensitivity,
            num_strata=num_strata,
            min_tokens_per_sequence=min_tokens_per_sequence,
        )
        if _is_its_own(router, model) and engine == "sparse":
            # What such a router would compute, the pass without gradient comes by anyway.
            config = replace(config, exit_layer=router.num_layers)
            router = None
        self.model = model
        self.router = router if _stands_alone(router, model) else None
        """A router with weights of its own moves and is saved with this; another has none."""
        self._name = attach(model, config, router=router).name
        self._last: tuple[int, Tensor] | None = None
        """The step, and the logits that were trained: looked at when somebody asks, not before."""
        self.train()

    @property
    def gradients(self) -> Gradients:
        """The adapter: `detach()` restores the model."""
        gradients = attached(self.model)[self._name]
        assert isinstance(gradients, Gradients)
        return gradients

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs: Any) -> Any:
        """The loss; without labels, the model's own output."""
        if labels is None:
            return self.model(input_ids=input_ids, **inputs)
        learns = self.training and torch.is_grad_enabled()
        if learns:
            self._last = None  # what was trained before is held until now, and no longer
        output = self.model(input_ids=input_ids, labels=labels, **inputs)
        if learns:
            self._last = self.gradients.selector.schedule.steps, logits_of(output).detach()
        return output[0] if isinstance(output, tuple) else output.loss

    def step(self) -> None:
        """The optimizer has stepped: the curriculum advances by this alone from now on."""
        self.gradients.step()

    def get_metrics(self) -> dict[str, Any]:
        """Of the last training batch; confidence and entropy are those of the trained tokens.
        (Asking waits for the device.)"""
        if self._last is None:
            return {}
        step, logits = self._last
        gradients = self.gradients
        metrics = gradients.metrics()
        return {
            **metrics,
            "step": step,
            **_sureness(logits),
            "token_ratio": metrics["ratio"],
            "tokens_selected": int(metrics["tokens_selected"]),
            "tokens_total": int(metrics["tokens_total"]),
            "selection": gradients.config.selection,
            "scoring": gradients.config.score,
            "engine": gradients.engine,
        }

    def get_extra_state(self) -> dict[str, Any]:
        return self.gradients.get_extra_state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.gradients.set_extra_state(state)


def _is_its_own(router: Any, model: nn.Module) -> TypeGuard[TruncatedRouter]:
    """Whether it is the model's own first layers."""
    ours = isinstance(router, TruncatedRouter) and not router.passthrough
    return ours and router.of is model


def _stands_alone(router: Any, model: nn.Module) -> bool:
    """Whether it is a module that shares no weight with the model."""
    if not isinstance(router, nn.Module):
        return False
    shared = {id(p) for p in model.parameters()}
    return not any(id(p) in shared for p in router.parameters())


def _sureness(logits: Tensor) -> dict[str, float]:
    """The mean top probability and entropy of the rows that were trained."""
    _, top_N, entropy_N = measured(logits.flatten(0, -2), None, "entropy")
    return {"avg_confidence": top_N.mean().item(), "avg_entropy": entropy_N.mean().item()}
