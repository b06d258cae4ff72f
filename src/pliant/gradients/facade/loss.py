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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.data.collate import IGNORED
from pliant.errors import InvalidInput
from pliant.gradients.cautions import warn_if_biased
from pliant.gradients.config import Engine, GradientConfig, Score, Selection
from pliant.gradients.labelled_batch import divisor, following
from pliant.gradients.selection.rules import mask_and_weights
from pliant.gradients.selection.scores import measured
from pliant.gradients.selector import Schedule

BaseLoss = Callable[[Tensor, Tensor], Tensor]


class TokenRule(nn.Module):
    """Chooses tokens by their logits, at each step so many: what CGGRLoss and CGGRScorer share."""

    def __init__(self, config: GradientConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule = Schedule(config)
        self.draws = 0
        """The draws so far: each has its own seed."""

    def step(self) -> None:
        """The optimizer has stepped: the curriculum advances by this alone from now on."""
        self.schedule.step()

    @property
    def step_count(self) -> Tensor:
        """The steps that are over. `step_count.fill_(1000)` goes on from there."""
        return self.schedule.count

    def get_extra_state(self) -> dict[str, Any]:
        return {**self.schedule.state(), "draws": self.draws}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        draws = state.get("draws")
        if not isinstance(draws, int) or draws < 0:
            raise InvalidInput(f"draws = {draws!r} in a saved state: give a whole number")
        self.schedule.load_state(state)
        self.draws = draws

    @torch.no_grad()
    def choose(self, logits_BTV: Tensor, targets_BT: Tensor | None, valid_BT: Tensor) -> Choice:
        """This step's share of the valid positions; without targets, by what the model expects."""
        targets_N = None if targets_BT is None else targets_BT.flatten()
        scores = measured(logits_BTV.flatten(0, 1), targets_N, self.config.score)
        difficulty_BT, confidence_BT, entropy_BT = (x.view(valid_BT.shape) for x in scores)
        # Only a dynamic ratio waits for the confidence.
        sure = float(mean_where(valid_BT, confidence_BT)) if self.config.dynamic else None
        ratio = self.schedule.ratio(sure)
        self.draws += 1
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.draws)
        mask_BT, weights_BT = mask_and_weights(
            difficulty_BT, valid_BT, self.config, ratio, generator
        )
        return Choice(mask_BT, weights_BT, ratio, difficulty_BT, confidence_BT, entropy_BT)


@dataclass(frozen=True, eq=False)
class Choice:
    """The chosen positions, and what they were chosen by."""

    mask_BT: Tensor
    weights_BT: Tensor
    ratio: float
    difficulty_BT: Tensor
    confidence_BT: Tensor
    entropy_BT: Tensor


class CGGRLoss(TokenRule):
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
        config = config_of(
            scoring=scoring,
            selection=selection,
            dynamic_threshold=dynamic_threshold,
            threshold_sensitivity=threshold_sensitivity,
            min_tokens_ratio=min_tokens_ratio,
            warmup_steps=warmup_steps,
            num_strata=num_strata,
            min_tokens_per_sequence=min_tokens_per_sequence,
        )
        super().__init__(config)
        warn_if_biased(config)
        self.base_loss: BaseLoss = _cross_entropy if base_loss is None else base_loss
        self._last: dict[str, Any] = {}

    def forward(
        self,
        logits: Any,
        targets: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        *,
        router_logits: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of the chosen tokens' losses over the number of labelled tokens.

        That number is `num_items_in_batch` where a Trainer counted the tokens of a whole step: so
        the batches of one step add up to what they would be as one. `router_logits`, aligned as
        the logits are, give the scores in their place.
        """
        logits_BTV, targets_BT = aligned(logits, targets)
        valid_BT = targets_BT != getattr(self.base_loss, "ignore_index", IGNORED)
        mask_BT, weights_BT = valid_BT, valid_BT.float()
        if self.training and torch.is_grad_enabled():
            self.schedule.begin(num_items_in_batch)
            scored_BTV = logits_BTV if router_logits is None else router_logits
            mask_BT, weights_BT = self._chosen(scored_BTV, targets_BT, valid_BT)
        total = self._loss(logits_BTV, targets_BT, mask_BT, weights_BT)
        return total / divisor(valid_BT, num_items_in_batch)

    def get_metrics(self) -> dict[str, Any]:
        """Of the last training batch. (Asking waits for the device.)"""
        return {k: v.item() if isinstance(v, Tensor) else v for k, v in self._last.items()}

    @torch.no_grad()
    def _chosen(
        self, logits_BTV: Tensor, targets_BT: Tensor, valid_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mask of what is trained, and its weights."""
        known_BT = targets_BT.masked_fill(~valid_BT, IGNORED)
        choice = self.choose(logits_BTV, known_BT, valid_BT)
        mask_BT, weights_BT = choice.mask_BT, choice.weights_BT
        self._last = {
            "step": self.schedule.steps,
            "token_ratio": choice.ratio,
            "tokens_selected": mask_BT.sum(),
            "tokens_total": valid_BT.sum(),
            "avg_confidence": mean_where(valid_BT, choice.confidence_BT),
            "avg_entropy": mean_where(valid_BT, choice.entropy_BT),
            "avg_difficulty": mean_where(valid_BT, choice.difficulty_BT),
            "avg_difficulty_selected": mean_where(mask_BT, choice.difficulty_BT),
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


SEED_NAMES = {
    "ratio": "min_tokens_ratio",
    "score": "scoring",
    "dynamic": "dynamic_threshold",
    "sensitivity": "threshold_sensitivity",
}
"""A setting of GradientConfig -> the seed's name of it, where they differ."""


def config_of(engine: Engine = "exact", **settings: Any) -> GradientConfig:
    """From the seed's parameters; an error names them as they were passed."""
    own = {seed: name for name, seed in SEED_NAMES.items()}
    try:
        return GradientConfig(engine, **{own.get(k, k): v for k, v in settings.items()})
    except InvalidInput as error:
        name, equals, rest = str(error).partition(" = ")
        raise InvalidInput(f"{SEED_NAMES.get(name, name)}{equals}{rest}") from error


def _cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="none")


# --- logits and targets ---------------------------------------------------------------------------


def logits_of(outputs: Any) -> Tensor:
    """The logits of a tensor, a ModelOutput, a dict or a tuple (in which a loss may come first)."""
    logits = outputs
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    elif isinstance(outputs, (tuple, list)):
        logits = next((x for x in outputs if isinstance(x, Tensor) and x.dim() >= 2), None)
    elif not isinstance(outputs, Tensor):
        logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise InvalidInput(f"a {type(outputs).__name__} without logits: give a model's output")
    return logits


def aligned(outputs: Any, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) and the target of each, (B, T).

    A tensor's logits are aligned with their targets already, as (B, T, V) and (B, T) or as (N, V)
    and (N,), which is one row. A model's output is aligned with the labels of its inputs: each
    position predicts the next label, and the last none.
    """
    logits = logits_of(outputs)
    if targets is None:
        raise InvalidInput("there are no targets: criterion(logits, targets) takes them second")
    if logits.dim() not in (2, 3) or targets.shape != logits.shape[:-1]:
        raise InvalidInput(
            f"targets of shape {tuple(targets.shape)} for logits of {tuple(logits.shape)}: "
            "give (N,) for (N, V), or (B, T) for (B, T, V)"
        )
    if logits.dim() == 2:
        return logits[None], targets[None]
    if isinstance(outputs, Tensor):
        return logits, targets
    return logits, following(targets)


def mean_where(mask_BT: Tensor, values_BT: Tensor) -> Tensor:
    """The mean of the masked; 0 if there are none."""
    return torch.where(mask_BT, values_BT, 0.0).sum() / mask_BT.sum().clamp(min=1)
