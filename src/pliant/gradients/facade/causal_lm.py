"""CGGRModel: a model that trains on some of its tokens, for training loops without adapters.

    router = create_truncated_router(model, num_layers=4)
    cggr_model = CGGRModel(model, router=router, min_tokens_ratio=0.25)
    loss = cggr_model(input_ids, labels=labels)
    loss.backward()

A facade: `pliant.gradients.attach` does the work, on `cggr_model.model`, which stays itself. For a
Trainer, attach to the model instead (a call of this returns a loss, and no output).
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from pliant.adapters import attached
from pliant.data.collate import IGNORED
from pliant.errors import UnsupportedModel
from pliant.gradients.config import Engine, Score, Selection
from pliant.gradients.facade.loss import CGGRLoss, config_of, logits_of
from pliant.gradients.facade.scorer import TruncatedRouter
from pliant.gradients.labelled_batch import following
from pliant.gradients.model import Gradients, GradientsWarning, attach
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
        settings: dict[str, Any] = {
            "min_tokens_ratio": min_tokens_ratio,
            "warmup_steps": warmup_steps,
            "dynamic_threshold": dynamic_threshold,
            "threshold_sensitivity": threshold_sensitivity,
            "selection": selection,
            "scoring": scoring,
            "num_strata": num_strata,
            "min_tokens_per_sequence": min_tokens_per_sequence,
        }
        config = config_of(engine, **settings)
        if _is_its_own(router, model) and engine == "sparse":
            # What such a router would compute, the pass without gradient comes by anyway.
            config = replace(config, exit_layer=router.num_layers)
            router = None
        self.model = model
        self.router = router if _stands_alone(router, model) else None
        """A router with weights of its own moves and is saved with this; another has none."""
        self.criterion: CGGRLoss | None = None
        """The loss of a model that nothing can be attached to: it is run whole."""
        # In a list: a router that shares weights with the model is no part of this.
        self._routers = [] if router is None or _is_whole(router, model) else [router]
        self._last: tuple[int, Tensor, Tensor] | None = None
        """The step, its labels and the logits that were trained: looked at when somebody asks."""
        try:
            self._name = attach(model, config, router=router).name
        except UnsupportedModel as error:
            self.criterion = _pass_through(settings, error)
        self.train()

    @property
    def gradients(self) -> Gradients:
        """The adapter: `detach()` restores the model."""
        if self.criterion is not None:
            raise UnsupportedModel(
                f"nothing is attached to {type(self.model).__name__}, which is run whole: its "
                "steps and settings are those of `criterion`"
            )
        gradients = attached(self.model)[self._name]
        assert isinstance(gradients, Gradients)
        return gradients

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs: Any) -> Any:
        """The loss; without labels, the model's own output."""
        if self.criterion is not None:
            return self._whole(input_ids, labels, inputs)
        if labels is None:
            return self.model(input_ids=input_ids, **inputs)
        learns = self.training and torch.is_grad_enabled()
        if learns:
            self._last = None  # what was trained before is held until now, and no longer
        output = self.model(input_ids=input_ids, labels=labels, **inputs)
        if learns:
            self._last = int(self.step_count), labels, logits_of(output).detach()
        return output[0] if isinstance(output, tuple) else output.loss

    def _whole(self, input_ids: Tensor, labels: Tensor | None, inputs: dict[str, Any]) -> Any:
        """All of the model runs, forward and backward; the loss is that of the chosen tokens."""
        output = self.model(input_ids, **inputs)
        if labels is None:
            return output
        assert self.criterion is not None
        scores = None
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                for router in self._routers:
                    scores = logits_of(router(input_ids, **inputs))
        return self.criterion(logits_of(output), following(labels), router_logits=scores)

    def step(self) -> None:
        """The optimizer has stepped: the curriculum advances by this alone from now on."""
        (self.criterion or self.gradients).step()

    @property
    def step_count(self) -> Tensor:
        """The steps that are over. `step_count.fill_(1000)` goes on from there."""
        whole = self.criterion
        return whole.step_count if whole is not None else self.gradients.selector.schedule.count

    def get_metrics(self) -> dict[str, Any]:
        """Of the last training batch; confidence and entropy are those of the trained tokens.
        (Asking waits for the device.)"""
        if self.criterion is not None:
            return self.criterion.get_metrics()
        if self._last is None:
            return {}
        step, labels, logits = self._last
        gradients = self.gradients
        labelled = int((labels != IGNORED).sum())  # without figures, all of them were trained
        every = {"tokens_selected": labelled, "tokens_total": labelled, "ratio": 1.0}
        metrics = gradients.metrics() or every
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
        """Empty where `criterion`, which is saved as a part of this, has the state."""
        return self.gradients.get_extra_state() if self.criterion is None else {}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if self.criterion is None:
            self.gradients.set_extra_state(state)


def _pass_through(settings: dict[str, Any], reason: UnsupportedModel) -> CGGRLoss:
    warnings.warn(
        f"{reason} CGGRModel therefore runs the whole model, forward and backward, and only the "
        "loss is that of the chosen tokens: no step is cheaper.",
        GradientsWarning,
        stacklevel=3,
    )
    return CGGRLoss(**settings)


def _is_its_own(router: Any, model: nn.Module) -> TypeGuard[TruncatedRouter]:
    """Whether it is the model's own first layers."""
    ours = isinstance(router, TruncatedRouter) and not router.passthrough
    return ours and router.of is model


def _is_whole(router: Any, model: nn.Module) -> bool:
    """Whether it is the model itself, whose logits there are anyway."""
    return isinstance(router, TruncatedRouter) and router.passthrough and router.of is model


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
