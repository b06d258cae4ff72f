"""CGGRLoss: a cross entropy over some of the tokens, for loops that have the logits already.

    criterion = CGGRLoss(selection="sampled", min_tokens_ratio=0.25)
    loss = criterion(logits, targets)                     # aligned pairs, as for a cross entropy
    loss = criterion(model(input_ids), labels)            # a model's output: labels are shifted
    Trainer(..., compute_loss_func=criterion)

The model has been run whole and is trained whole: what is saved is the loss on the other rows. To
save more, let `pliant.gradients.attach` (or CGGRModel) choose before the backward pass is built.
Under `torch.no_grad()` and in eval mode, it is the loss of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.data.collate import IGNORED
from pliant.errors import InvalidInput
from pliant.gradients.cautions import warn_if_biased
from pliant.gradients.config import Score, Selection
from pliant.gradients.facade.seed import Steps, aligned, config_of, mean_where
from pliant.gradients.selection.rules import mask_and_weights
from pliant.gradients.selection.scores import measured

BaseLoss = Callable[[Tensor, Tensor], Tensor]


class CGGRLoss(nn.Module):
    """The loss of the tokens that a rule chooses, and what it did, in `get_metrics()`."""

    def __init__(
        self,
        scoring: Score = "combined",
        selection: Selection = "topk",
        dynamic_threshold: bool = True,
        threshold_sensitivity: float = 0.5,
        min_tokens_ratio: float = 0.25,
        warmup_steps: int = 1000,
        num_strata: int = 4,
        min_tokens_per_sequence: int = 1,
        base_loss: BaseLoss | None = None,
    ) -> None:
        """`base_loss` gives the loss of each row of (N, V) logits; left out, a cross entropy."""
        super().__init__()
        self.config = config_of(
            min_tokens_ratio=min_tokens_ratio,
            warmup_steps=warmup_steps,
            dynamic_threshold=dynamic_threshold,
            threshold_sensitivity=threshold_sensitivity,
            selection=selection,
            scoring=scoring,
            num_strata=num_strata,
            min_tokens_per_sequence=min_tokens_per_sequence,
        )
        warn_if_biased(self.config)
        self.base_loss: BaseLoss = _cross_entropy if base_loss is None else base_loss
        self.steps = Steps(self.config)
        self._last: dict[str, Any] = {}

    def forward(
        self,
        logits: Any,
        targets: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The weighted sum of the chosen tokens' losses over the number of labelled tokens.

        That number is `num_items_in_batch` where a Trainer counted the tokens of a whole step: so
        the batches of one step add up to what they would be as one.
        """
        logits_BTV, targets_BT = aligned(logits, targets)
        valid_BT = targets_BT != getattr(self.base_loss, "ignore_index", IGNORED)
        mask_BT, weights_BT = valid_BT, valid_BT.float()
        if self.training and torch.is_grad_enabled():
            self.steps.begin(num_items_in_batch)
            mask_BT, weights_BT = self._chosen(logits_BTV, targets_BT, valid_BT)
        total = self._loss(logits_BTV, targets_BT, mask_BT, weights_BT)
        return total / _count(valid_BT, num_items_in_batch)

    def step(self) -> None:
        """The optimizer has stepped: the curriculum advances by this alone from now on."""
        self.steps.step()

    def get_metrics(self) -> dict[str, Any]:
        """Of the last training batch. (Asking waits for the device.)"""
        return {k: v.item() if isinstance(v, Tensor) else v for k, v in self._last.items()}

    def get_extra_state(self) -> dict[str, Any]:
        return self.steps.state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.steps.load_state(state)

    @torch.no_grad()
    def _chosen(
        self, logits_BTV: Tensor, targets_BT: Tensor, valid_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mask of what is trained, and its weights."""
        known_BT = targets_BT.masked_fill(~valid_BT, IGNORED)
        scores = measured(logits_BTV.flatten(0, 1), known_BT.flatten(), self.config.score)
        difficulty_BT, confidence_BT, entropy_BT = (x.view(valid_BT.shape) for x in scores)
        confidence = mean_where(valid_BT, confidence_BT)
        ratio = self.steps.ratio(confidence)
        mask_BT, weights_BT = mask_and_weights(
            difficulty_BT, valid_BT, self.config, ratio, self.steps.generator()
        )
        self._last = {
            "step": self.steps.schedule.steps,
            "token_ratio": ratio,
            "tokens_selected": mask_BT.sum(),
            "tokens_total": valid_BT.sum(),
            "avg_confidence": confidence,
            "avg_entropy": mean_where(valid_BT, entropy_BT),
            "avg_difficulty": mean_where(valid_BT, difficulty_BT),
            "avg_difficulty_selected": mean_where(mask_BT, difficulty_BT),
            "max_weight": weights_BT.masked_fill(~mask_BT, 0.0).amax(),
            "selection": self.config.selection,
            "scoring": self.config.score,
        }
        return mask_BT, weights_BT

    def _loss(
        self, logits_BTV: Tensor, targets_BT: Tensor, mask_BT: Tensor, weights_BT: Tensor
    ) -> Tensor:
        """The weighted sum over the masked tokens; 0, and yet to be differentiated, of none."""
        logits_NV = logits_BTV[mask_BT]
        if not len(logits_NV):
            return logits_BTV.flatten()[:0].sum().float()
        losses_N = self.base_loss(logits_NV, targets_BT[mask_BT])
        if losses_N.shape != logits_NV.shape[:1]:
            raise InvalidInput(
                f"base_loss gave {tuple(losses_N.shape)} for {len(logits_NV)} tokens: "
                'one loss a token is due (reduction="none")'
            )
        return (weights_BT[mask_BT] * losses_N).sum()


def _cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def _count(valid_BT: Tensor, items: Tensor | int | None) -> Tensor | int:
    """What the losses' sum is divided by."""
    if items is None:
        return valid_BT.sum().clamp(min=1)
    return items.to(valid_BT.device) if isinstance(items, Tensor) else items
