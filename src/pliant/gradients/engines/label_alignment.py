"""Which label a model's own loss compares with each position: tried on it, a few tokens long.

Most causal models take the labels beside their tokens and shift them. Some (BART's decoder, XLNet)
take labels that were shifted before, and a head of another kind has another loss altogether.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pliant.anatomy.trial import trial_ids, verdict
from pliant.data.collate import IGNORED
from pliant.gradients.engines.split_forward import SplitForward

LENGTH = 16
CLOSE = 0.02
"""Relative: of a loss that is computed in half precision."""


@dataclass(frozen=True)
class LabelAlignment:
    """How labels relate to positions."""

    aligned: bool = False
    """The loss of position t compares with label t, and not with the next."""
    other: str | None = None
    """Why neither is this model's own loss."""


def label_alignment(split: SplitForward) -> LabelAlignment:
    fresh = SplitForward(split.anatomy, split.forward)  # what is tried is not counted
    return verdict(
        split.anatomy.model,
        "labels",
        lambda: _try(fresh),
        lambda reason: LabelAlignment(other=reason),
    )


def _try(split: SplitForward) -> LabelAlignment:
    """Compare the model's own loss on a few tokens with the two that may be meant."""
    if getattr(getattr(split.anatomy.model, "config", None), "is_encoder_decoder", False):
        return LabelAlignment(other="its decoder's inputs are made of its labels")
    ids_BT = trial_ids(split.anatomy, LENGTH)
    inputs = {"input_ids": ids_BT, "use_cache": False}
    if getattr(split.anatomy.config, "output_router_logits", False):
        inputs["output_router_logits"] = False  # its loss includes another one, then
    labels_BT = ids_BT.flip(1)
    labels_BT[0, :3] = IGNORED
    output = split.forward(**inputs, labels=labels_BT, return_dict=True)
    own, logits_BTV = float(output.loss), output.logits
    if logits_BTV is None:  # some kernels compute only a loss: that of causal models
        return LabelAlignment()
    off_shifted = abs(_loss(logits_BTV[:, :-1], labels_BT[:, 1:]) - own)
    off_aligned = abs(_loss(logits_BTV, labels_BT) - own)
    if not min(off_shifted, off_aligned) <= CLOSE * abs(own):
        return LabelAlignment(other="it is no cross entropy of the tokens' labels")
    return LabelAlignment(aligned=off_aligned < off_shifted)


def _loss(logits_BTV: Tensor, labels_BT: Tensor) -> float:
    return float(
        F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED)
    )
