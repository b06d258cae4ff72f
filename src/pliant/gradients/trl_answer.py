"""What trl's trainers ask a model for, with the gradient of the chosen tokens alone.

They call it with `fused_lm_head=True` and make their loss of the log-probability of every token.
Here each has its true value, and the chosen ones have a gradient, times their weight: whatever loss
is made of them, its gradient is the one of all tokens on average, if the rule that chooses is
unbiased. Letters: B sequences of T positions, N chosen rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pliant.data.collate import IGNORED
from pliant.errors import InvalidInput
from pliant.gradients.batch import Lesson
from pliant.gradients.choosing.rules import Chosen
from pliant.gradients.engines.passage import Passage, hidden_of, rows_of, with_hidden

FLAG = "fused_lm_head"
"""The argument of a forward that asks so."""


def answer(
    passage: Passage, lesson: Lesson, decoded: Any, chosen: Chosen | None, whole: Any
) -> tuple[Any, Tensor]:
    """trl's own output, and the losses of the chosen rows.

    `decoded` is right at the chosen positions (None: all of them) and has their gradient, `whole`
    is right at all.
    """
    if lesson.user_BT is not None:
        raise InvalidInput(
            "loss_weights: trl's trainers make their own loss of each token, and these would not "
            "reach it. Weigh the loss there, or train with transformers' Trainer"
        )
    if chosen is None:
        told = _asked(passage, lesson, decoded, lesson.targets_BT)
        losses = -told.log_probs.detach()[lesson.valid_BT]
    else:
        with torch.no_grad():
            told = _asked(passage, lesson, whole, lesson.targets_BT)
        losses = _give_slope(told, passage, lesson, decoded, chosen)
    told.loss = -told.log_probs.sum() / lesson.count
    if not lesson.shifted:  # as many positions as trl's own answer has
        for name, value in told.items():
            if isinstance(value, Tensor) and value.shape == lesson.targets_BT.shape:
                told[name] = value[:, :-1]
    return told, losses


def _asked(passage: Passage, lesson: Lesson, decoded: Any, targets: Tensor) -> Any:
    """What trl's own code makes of this output of the decoder."""
    return passage.rest(decoded, {**lesson.inputs, FLAG: True, "shift_labels": targets})


def _give_slope(
    told: Any, passage: Passage, lesson: Lesson, decoded: Any, chosen: Chosen
) -> Tensor:
    """Let the values of the chosen rows have their gradient; gives these rows' losses."""
    at_BK, live_BK = chosen.positions_BK, chosen.live_BK
    rows_ND = rows_of(hidden_of(decoded), at_BK, live_BK)
    targets_N = lesson.targets_BT.gather(1, at_BK)[live_BK]
    if not len(rows_ND):  # nothing to learn, and yet something to call backward on
        rows_ND = hidden_of(decoded)[:1, 0]
        targets_N = torch.full((1,), IGNORED, device=rows_ND.device)
    learned = _asked(passage, lesson, with_hidden(decoded, rows_ND[None]), targets_N[None])
    for name in ("log_probs", "entropy"):
        values_BT, live_1N = told.get(name), learned.get(name)
        if values_BT is not None and live_1N.requires_grad:
            told[name] = values_BT + _slope(live_1N[0], chosen, values_BT)
    told.aux_loss = learned.aux_loss
    losses_N: Tensor = -learned.log_probs.detach()[0]
    return losses_N[targets_N != IGNORED]


def _slope(live_N: Tensor, chosen: Chosen, like_BT: Tensor) -> Tensor:
    """(B, T): 0 everywhere, with the weighted gradient of what lives at the chosen positions."""
    weights_N = chosen.weights_BK[chosen.live_BK].to(live_N)
    slope_BT = torch.zeros_like(like_BT)
    if not len(weights_N):
        return slope_BT + 0.0 * live_N.sum()
    zero_N = weights_N * (live_N - live_N.detach())
    row_N = chosen.live_BK.nonzero()[:, 0]
    return slope_BT.index_put((row_N, chosen.positions_BK[chosen.live_BK]), zero_N.to(like_BT))
