"""What is tried on a model, a few tokens long: whether two passes give what one gives, and which
label its own loss compares with each position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pliant.anatomy.decoder import last_hidden_state
from pliant.anatomy.modes import attention_among, eval_mode, without_checkpointing
from pliant.anatomy.trial import is_close, trial_ids, verdict
from pliant.data.collate import IGNORED
from pliant.gradients.engines.split_forward import SplitForward
from pliant.gradients.engines.two_passes import KINDS, first_pass, second_pass

LENGTH, PADS = 16, 4
POSITIONS = ((1, 3, 6, 7, 11), (4, 5, 8, 10, 11))
"""Some of each row, none of them padding."""


@dataclass(frozen=True)
class Exactness:
    """Why two passes are not exact, for each kind of padding; None where they are."""

    plain: str | None
    padded_right: str | None
    padded_left: str | None

    @property
    def against_any(self) -> str | None:
        """The reason against batches of which any may be padded, on either side."""
        return self.plain or self.padded_right or self.padded_left

    def against(self, mask: Any) -> str | None:
        """The reason against a batch with this attention mask."""
        if self.plain or not isinstance(mask, Tensor) or mask.dim() != 2:
            return self.plain
        if self.padded_right == self.padded_left:
            return self.padded_right
        on_left = not bool(mask[:, 0].all())
        return self.padded_left if on_left else self.padded_right


def exactness(split: SplitForward) -> Exactness:
    """Try it in the mode that the model is in: dropout counts while it trains."""
    plain = _against(split, None)
    if plain is not None:
        return Exactness(plain, plain, plain)
    return Exactness(None, _against(split, "right"), _against(split, "left"))


def _against(split: SplitForward, padding: str | None) -> str | None:
    model = split.anatomy.model
    question = f"two passes, padding {padding}"
    reason = verdict(model, question, lambda: _mismatch(split, padding), str)
    if reason is None or not model.training:
        return reason
    with eval_mode(model):
        in_eval_mode = verdict(model, question, lambda: _mismatch(split, padding), str)
    return reason if in_eval_mode else "its dropout would draw anew in each of the two passes"


def _mismatch(split: SplitForward, padding: str | None) -> str | None:
    model = split.anatomy.model
    inputs = _inputs(split, padding)
    at_BK = torch.tensor(POSITIONS, device=inputs["input_ids"].device)
    live_BK = torch.ones_like(at_BK, dtype=torch.bool)
    with attention_among(model, *KINDS), without_checkpointing(model):
        expected = last_hidden_state(split.backbone(inputs))
    first = first_pass(split, inputs)
    ours = last_hidden_state(second_pass(split, inputs, first.pairs, at_BK, live_BK))
    index = at_BK.unsqueeze(-1).expand(-1, -1, expected.shape[-1])
    if is_close(model, ours.gather(1, index), expected.gather(1, index)):
        return None
    where = f" in a batch padded on the {padding}" if padding else ""
    return f"the hidden states at the chosen positions differ{where}"


def _inputs(split: SplitForward, padding: str | None) -> dict[str, Any]:
    ids = trial_ids(split.anatomy, LENGTH)
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if padding:
        mask = torch.ones_like(ids)
        mask[1, slice(LENGTH - PADS, None) if padding == "right" else slice(PADS)] = 0
        inputs["attention_mask"] = mask
    return inputs


# --- the alignment of labels ----------------------------------------------------------------------

LOSS_CLOSE = 0.02
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
        lambda: _compare(fresh),
        lambda reason: LabelAlignment(other=reason),
    )


def _compare(split: SplitForward) -> LabelAlignment:
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
    if not min(off_shifted, off_aligned) <= LOSS_CLOSE * abs(own):
        return LabelAlignment(other="it is no cross entropy of the tokens' labels")
    return LabelAlignment(aligned=off_aligned < off_shifted)


def _loss(logits_BTV: Tensor, labels_BT: Tensor) -> float:
    return float(
        F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED)
    )
