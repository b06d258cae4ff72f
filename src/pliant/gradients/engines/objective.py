"""What a model's own loss holds each position against: tried on it, a few tokens long.

Most causal models take the labels beside their tokens and shift them. Some (BART's decoder, XLNet)
take labels that were shifted before, and a head of another kind has another loss altogether: an
architecture's name would not tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.data.collate import IGNORED
from pliant.gradients.engines.passage import Passage
from pliant.gradients.engines.standing import devices, trial

CLOSE = 0.02
"""Relative: of a loss that is computed in half precision."""


@dataclass(frozen=True)
class Objective:
    """How labels stand to positions."""

    aligned: bool = False
    """Position t is held against label t, and not against the next."""
    other: str | None = None
    """Why neither is this model's own loss."""


_known: WeakKeyDictionary[nn.Module, Objective] = WeakKeyDictionary()


def objective(passage: Passage) -> Objective:
    """What is found once a model stands for it."""
    model = passage.anatomy.model
    if model not in _known:
        _known[model] = _tried(Passage(passage.anatomy, passage.forward))
    return _known[model]


@torch.no_grad()
def _tried(passage: Passage) -> Objective:
    """Hold the model's own loss on a few tokens beside the two that may be meant."""
    if getattr(getattr(passage.anatomy.model, "config", None), "is_encoder_decoder", False):
        return Objective(other="what its decoder reads is made of its labels")
    inputs, _ = trial(passage, None)
    if getattr(passage.anatomy.config, "output_router_logits", False):
        inputs["output_router_logits"] = False  # its loss holds more, then
    labels_BT = inputs["input_ids"].flip(1)
    labels_BT[0, :3] = IGNORED
    try:
        with torch.random.fork_rng(devices=devices(passage)):
            output = passage.forward(**inputs, labels=labels_BT, return_dict=True)
        own, logits_BTV = float(output.loss), output.logits
        if logits_BTV is None:  # some kernels make only a loss: of causal models
            return Objective()
        shifted = _loss(logits_BTV[:, :-1], labels_BT[:, 1:])
        aligned = _loss(logits_BTV, labels_BT)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model says to labels that it was not made for
        said = " ".join(str(error).split())[:160]
        return Objective(other=f"{type(error).__name__}: {said}")
    off_shifted, off_aligned = abs(shifted - own), abs(aligned - own)
    if not min(off_shifted, off_aligned) <= CLOSE * abs(own):
        return Objective(other="it is no cross entropy of the tokens' labels")
    return Objective(aligned=off_aligned < off_shifted)


def _loss(logits_BTV: Tensor, labels_BT: Tensor) -> float:
    return float(
        F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED)
    )
