"""Whether two passes give on this model what one gives: tried on it, a few tokens long.

An architecture's name would not tell. Dropout draws anew in each pass, some models mix positions
outside of their attention, and some only count them otherwise when a batch is padded on the left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.anatomy.rest import at_rest
from pliant.gradients.engines.passage import Passage, attention_by, hidden_of, without_checkpointing
from pliant.gradients.engines.sparse import KINDS, first_pass, second_pass

LENGTH, PADS = 16, 4
CLOSE, CLOSE_IN_HALF = 1e-4, 0.05
"""Relative, and far below what a wrong mask or position makes of a hidden state."""


@dataclass(frozen=True)
class Standing:
    """Why two passes are not exact, for batches that are padded so or so; None where they are."""

    plain: str | None
    padded_right: str | None
    padded_left: str | None

    @property
    def against_any(self) -> str | None:
        """The reason against batches of which some may be padded, and nobody knows how."""
        return self.plain or self.padded_right or self.padded_left

    def against(self, mask: Any) -> str | None:
        """The reason against a batch with this attention mask."""
        if self.plain or not isinstance(mask, Tensor) or mask.dim() != 2:
            return self.plain
        if self.padded_right == self.padded_left:
            return self.padded_right
        on_left = not bool(mask[:, 0].all())
        return self.padded_left if on_left else self.padded_right


@torch.no_grad()
def standing(passage: Passage) -> Standing:
    """Try it in the mode that the model is in: dropout counts while it trains."""
    with torch.random.fork_rng(devices=devices(passage)):
        plain = _against(passage, None)
        if plain is not None:
            return Standing(plain, plain, plain)
        return Standing(None, _against(passage, "right"), _against(passage, "left"))


def _against(passage: Passage, padding: str | None) -> str | None:
    reason = _mismatch(passage, padding)
    if reason is None or not passage.anatomy.model.training:
        return reason
    with at_rest(passage.anatomy.model):
        resting = _mismatch(passage, padding)
    return reason if resting else "its dropout would draw anew in each of the two passes"


def _mismatch(passage: Passage, padding: str | None) -> str | None:
    inputs, at_BK = trial(passage, padding)
    live_BK = torch.ones_like(at_BK, dtype=torch.bool)
    try:
        with attention_by(passage.anatomy, *KINDS), without_checkpointing(passage.anatomy):
            whole = hidden_of(passage.backbone(inputs))
        kept = first_pass(passage, inputs)
        ours = hidden_of(second_pass(passage, inputs, kept.pairs, at_BK, live_BK))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model says to a call that it was not made for
        said = " ".join(str(error).split())[:160]
        return f"{type(error).__name__}: {said}" if said else type(error).__name__
    index = at_BK.unsqueeze(-1).expand(-1, -1, whole.shape[-1])
    whole, ours = whole.gather(1, index).double(), ours.gather(1, index).double()
    exact = all(
        p.dtype in (torch.float32, torch.float64) for p in passage.anatomy.model.parameters()
    )
    off = (whole - ours).norm() / whole.norm().clamp(min=1e-30)
    if float(off) <= (CLOSE if exact else CLOSE_IN_HALF):
        return None
    where = f" in a batch padded on the {padding}" if padding else ""
    return f"the chosen positions come to something else{where}"


def trial(passage: Passage, padding: str | None) -> tuple[dict[str, Any], Tensor]:
    """Two rows of ordinary tokens, and some positions of each that are not padding."""
    anatomy = passage.anatomy
    size = int(getattr(anatomy.config, "vocab_size", 0) or 64)
    device = next(anatomy.embeddings.parameters()).device
    ids = torch.arange(2 * LENGTH, device=device).reshape(2, -1) * 3 % max(1, size // 2) + size // 4
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    at = torch.tensor([[1, 3, 6, 7, 11], [4, 5, 8, 10, 11]], device=device)
    if padding:
        mask = torch.ones_like(ids)
        mask[1, slice(LENGTH - PADS, None) if padding == "right" else slice(PADS)] = 0
        inputs["attention_mask"] = mask
    return inputs, at


def devices(passage: Passage) -> list[int]:
    index = next(passage.anatomy.embeddings.parameters()).device
    return [index.index or 0] if index.type == "cuda" else []
