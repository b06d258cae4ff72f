"""The model's output for trl's trainers, in which only the selected tokens have a gradient.

trl calls the model with `fused_lm_head=True` and computes its loss from the log-probability of
every token. Here each has its true value, and the selected ones have a gradient, times their
weight: for any such loss, the gradient is on average that of all tokens, if the selection is
unbiased. Letters: B sequences of T positions, N selected rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pliant.anatomy.decoder import last_hidden_state, with_hidden
from pliant.data.collate import IGNORED
from pliant.errors import InvalidInput
from pliant.gradients.engines.split_forward import SplitForward, rows_of
from pliant.gradients.labelled_batch import LabelledBatch
from pliant.gradients.selection.rules import Chosen

FLAG = "fused_lm_head"
"""The argument by which trl calls a forward so."""


def trl_output(
    split: SplitForward, batch: LabelledBatch, decoded: Any, chosen: Chosen | None, whole: Any
) -> tuple[Any, Tensor]:
    """trl's own output, and the losses of the selected rows.

    `decoded` is exact at the selected positions (None: all) and has their gradient; `whole` is
    exact everywhere.
    """
    if batch.user_BT is not None:
        raise InvalidInput(
            "loss_weights: trl's trainers compute their own loss of each token, and these would "
            "not reach it. Weigh the loss there, or train with transformers' Trainer"
        )
    if chosen is None:
        output = _fused_output(split, batch, decoded, batch.targets_BT)
        losses = -output.log_probs.detach()[batch.valid_BT]
    else:
        with torch.no_grad():
            output = _fused_output(split, batch, whole, batch.targets_BT)
        losses = _attach_gradient(output, split, batch, decoded, chosen)
    output.loss = -output.log_probs.sum() / batch.count
    if not batch.shifted:  # as many positions as trl's own output has
        for name, value in output.items():
            if isinstance(value, Tensor) and value.shape == batch.targets_BT.shape:
                output[name] = value[:, :-1]
    return output, losses


def _fused_output(split: SplitForward, batch: LabelledBatch, decoded: Any, targets: Tensor) -> Any:
    """The output that trl's own code computes from this decoder output."""
    return split.rest(decoded, {**batch.inputs, FLAG: True, "shift_labels": targets})


def _attach_gradient(
    output: Any, split: SplitForward, batch: LabelledBatch, decoded: Any, chosen: Chosen
) -> Tensor:
    """Give the values of the selected rows their gradient; returns the losses of these rows."""
    at_BK, live_BK = chosen.positions_BK, chosen.live_BK
    rows_ND = rows_of(last_hidden_state(decoded), at_BK, live_BK)
    targets_N = batch.targets_BT.gather(1, at_BK)[live_BK]
    if not len(rows_ND):  # nothing to learn, but backward needs a graph
        rows_ND = last_hidden_state(decoded)[:1, 0]
        targets_N = torch.full((1,), IGNORED, device=rows_ND.device)
    learned = _fused_output(split, batch, with_hidden(decoded, rows_ND[None]), targets_N[None])
    for name in ("log_probs", "entropy"):
        values_BT, live_1N = output.get(name), learned.get(name)
        if values_BT is not None and live_1N.requires_grad:
            output[name] = values_BT + _zero_with_gradient(live_1N[0], chosen, values_BT)
    output.aux_loss = learned.aux_loss
    losses_N: Tensor = -learned.log_probs.detach()[0]
    return losses_N[targets_N != IGNORED]


def _zero_with_gradient(live_N: Tensor, chosen: Chosen, like_BT: Tensor) -> Tensor:
    """(B, T) zeros that carry the weighted gradient of `live_N` at the selected positions."""
    weights_N = chosen.weights_BK[chosen.live_BK].to(live_N)
    zeros_BT = torch.zeros_like(like_BT)
    if not len(weights_N):
        return zeros_BT + 0.0 * live_N.sum()
    zero_N = weights_N * (live_N - live_N.detach())
    row_N = chosen.live_BK.nonzero()[:, 0]
    return zeros_BT.index_put((row_N, chosen.positions_BK[chosen.live_BK]), zero_N.to(like_BT))
