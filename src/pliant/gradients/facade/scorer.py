"""CGGRScorer: which positions are hard, as a mask of static shape, for models that route by it.

    router = create_truncated_router(model, num_layers=4)
    logits = router(input_ids, attention_mask=mask)
    difficulty, mask, info = CGGRScorer(router, min_tokens_ratio=0.5)(input_ids)
    expert_output = expert_layer(x) * mask.unsqueeze(-1)

Nothing of it is differentiated. Without labels a score looks at no later token: what the model
expects stands in for the target's loss (which ranks are taken still depends on the whole row).

A router is a model's first layers: logits for a fraction of its forward, and no weights at all. It
is the model's own forward that runs, with its own embeddings, masks, positions, norm and head:
after the first k layers the others hand the hidden state through. So at full depth the router is
the model, on every architecture; and it has no parameters and no state of its own.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.anatomy.depth import Walk
from pliant.anatomy.intercept import CALL, Handler, Target, intercept
from pliant.data.collate import IGNORED
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.gradients.config import Score, Selection
from pliant.gradients.facade.loss import TokenRule, config_of, logits_of
from pliant.gradients.labelled_batch import following


class CGGRScorer(TokenRule):
    """Scores positions by a router's logits."""

    def __init__(
        self,
        router: nn.Module,
        min_tokens_ratio: float = 0.25,
        warmup_steps: int = 1000,
        dynamic_threshold: bool = True,
        threshold_sensitivity: float = 0.5,
        selection: Selection = "topk",
        scoring: Score = "combined",
        num_strata: int = 4,
        min_tokens_per_sequence: int = 1,
    ) -> None:
        """`router` gives logits, or an output with logits, for `input_ids`."""
        super().__init__(
            config_of(
                min_tokens_ratio=min_tokens_ratio,
                warmup_steps=warmup_steps,
                dynamic_threshold=dynamic_threshold,
                threshold_sensitivity=threshold_sensitivity,
                selection=selection,
                scoring=scoring,
                num_strata=num_strata,
                min_tokens_per_sequence=min_tokens_per_sequence,
            )
        )
        self.router = router

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, **inputs: Any
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Difficulties (B, T), the mask of the hard (B, T), and what they are computed from.

        Position t is scored by what it predicts, token t + 1. With `labels`, only positions that
        predict one are chosen; with an `attention_mask`, none that is padding. `info` holds the
        `confidence` and `entropy` of each position, the `current_ratio`, and the `weights` that
        make the mask an unbiased sample where the rule draws one.
        """
        if "targets" in inputs:
            raise InvalidInput("targets: CGGRScorer takes labels, those of input_ids (unshifted)")
        if labels is not None and labels.shape != input_ids.shape:
            raise InvalidInput(
                f"labels of shape {tuple(labels.shape)} for input_ids of {tuple(input_ids.shape)}: "
                "give a label for each id, -100 where there is none"
            )
        if self.training:
            self.schedule.begin()
        logits_BTV = logits_of(self.router(input_ids, **inputs))
        targets_BT = None if labels is None else following(labels)
        valid_BT = _valid(input_ids, targets_BT, inputs.get("attention_mask"))
        choice = self.choose(logits_BTV, targets_BT, valid_BT)
        info = {
            "confidence": choice.confidence_BT,
            "entropy": choice.entropy_BT,
            "current_ratio": choice.ratio,
            "weights": choice.weights_BT.float().masked_fill(~choice.mask_BT, 0.0),
        }
        return choice.difficulty_BT, choice.mask_BT, info


def _valid(input_ids: Tensor, targets_BT: Tensor | None, attention_mask: Any) -> Tensor:
    valid_BT = torch.ones_like(input_ids, dtype=torch.bool)
    if targets_BT is not None:
        valid_BT = targets_BT != IGNORED
    if isinstance(attention_mask, Tensor) and attention_mask.shape == input_ids.shape:
        valid_BT = valid_BT & attention_mask.bool()
    return valid_BT


# --- the router -----------------------------------------------------------------------------------


class RouterWarning(UserWarning):
    """A router is the whole model, and as expensive."""


def create_truncated_router(model: nn.Module, num_layers: int = 2) -> TruncatedRouter:
    """The first `num_layers` layers of `model`, its norm and its head, as `router(input_ids)`."""
    return TruncatedRouter(model, num_layers)


class TruncatedRouter(nn.Module):
    """Gives logits (B, T, V) for what the model itself takes. Shares all with the model.

    A model whose layers are not found, or not run once each and in order, is run whole, which a
    warning says.
    """

    def __init__(self, model: nn.Module, num_layers: int = 2) -> None:
        super().__init__()
        # Inside a list the model is no part of it: no weights are listed or saved twice.
        self._whole = [model]
        self._anatomy: list[Anatomy] = []
        self.num_layers = num_layers
        try:
            self._anatomy = [Anatomy.of(model)]
        except UnsupportedModel as error:
            self._pass_through(str(error))
            return
        depth = len(self._anatomy[0].layers)
        if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
            raise InvalidInput(f"num_layers = {num_layers!r}: give 1 to {depth}")
        if num_layers > depth:
            raise InvalidInput(
                f"num_layers = {num_layers}: {type(model).__name__} has {depth}, so give 1 to "
                f"{depth}"
            )

    @property
    def of(self) -> nn.Module:
        """The model whose layers these are."""
        return self._whole[0]

    @property
    def passthrough(self) -> bool:
        """Whether the whole model is the router."""
        return not self._anatomy

    def forward(self, input_ids: Tensor | None = None, **inputs: Any) -> Tensor:
        model = self._whole[0]
        takes = inspect.signature(model.forward).parameters
        if input_ids is not None and self.passthrough and "input_ids" not in takes:
            return logits_of(model(input_ids, **inputs))
        if input_ids is not None:
            inputs["input_ids"] = input_ids
        if "use_cache" in takes:
            inputs.setdefault("use_cache", False)
        if self._anatomy:
            try:
                with intercept(_first_layers(self._anatomy[0], self.num_layers)):
                    return logits_of(model(**inputs))
            except UnsupportedModel as error:
                self._anatomy = []
                self._pass_through(str(error))
        return logits_of(model(**inputs))

    def extra_repr(self) -> str:
        kind = type(self._whole[0]).__name__
        return f"the whole {kind}" if self.passthrough else f"{self.num_layers} layers of {kind}"

    def _pass_through(self, reason: str) -> None:
        warnings.warn(
            f"the router is the whole {type(self._whole[0]).__name__}, at the cost of its whole "
            f"forward: {reason}",
            RouterWarning,
            stacklevel=4,
        )


def _first_layers(anatomy: Anatomy, k: int) -> dict[Target, Handler]:
    """For one forward, in which only the first k layers are computed."""
    walk, last = Walk(anatomy), None

    def call_of(layer: nn.Module) -> Handler:
        def call(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            nonlocal last
            if walk.step_to(layer) < k:
                last = original(*args, **kwargs)
            return last

        return call

    return {(layer, CALL): call_of(layer) for layer in anatomy.layers}
