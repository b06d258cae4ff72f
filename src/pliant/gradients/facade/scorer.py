"""CGGRScorer: which positions are hard, as a mask of static shape, for models that route by it.

    scorer = CGGRScorer(create_truncated_router(model, num_layers=4), min_tokens_ratio=0.5)
    difficulty, mask, info = scorer(input_ids)
    expert_output = expert_layer(x) * mask.unsqueeze(-1)

Nothing of it is differentiated. Without labels a score looks at no later token: what the model
expects stands in for the target's loss (which ranks are taken still depends on the whole row).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pliant.data.collate import IGNORED
from pliant.gradients.config import Score, Selection
from pliant.gradients.facade.seed import Steps, config_of, following, logits_of, mean_where
from pliant.gradients.selection.rules import mask_and_weights
from pliant.gradients.selection.scores import measured


class CGGRScorer(nn.Module):
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
        super().__init__()
        self.router = router
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
        self.steps = Steps(self.config)

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
        if self.training:
            self.steps.begin()
        logits_BTV = logits_of(self.router(input_ids, **inputs))
        targets_BT = None if labels is None else following(labels)
        targets_N = None if targets_BT is None else targets_BT.flatten()
        scores = measured(logits_BTV.flatten(0, 1), targets_N, self.config.score)
        difficulty_BT, confidence_BT, entropy_BT = (x.view(input_ids.shape) for x in scores)
        valid_BT = _valid(input_ids, targets_BT, inputs.get("attention_mask"))
        ratio = self.steps.ratio(mean_where(valid_BT, confidence_BT))
        mask_BT, weights_BT = mask_and_weights(
            difficulty_BT, valid_BT, self.config, ratio, self.steps.generator()
        )
        info = {
            "confidence": confidence_BT,
            "entropy": entropy_BT,
            "current_ratio": ratio,
            "weights": weights_BT.float().masked_fill(~mask_BT, 0.0),
        }
        return difficulty_BT, mask_BT, info

    def step(self) -> None:
        """The optimizer has stepped: the curriculum advances by this alone from now on."""
        self.steps.step()

    def get_extra_state(self) -> dict[str, Any]:
        return self.steps.state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.steps.load_state(state)


def _valid(input_ids: Tensor, targets_BT: Tensor | None, attention_mask: Any) -> Tensor:
    valid_BT = torch.ones_like(input_ids, dtype=torch.bool)
    if targets_BT is not None:
        valid_BT = targets_BT != IGNORED
    if isinstance(attention_mask, Tensor) and attention_mask.shape == input_ids.shape:
        valid_BT = valid_BT & attention_mask.bool()
    return valid_BT
