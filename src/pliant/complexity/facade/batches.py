"""Ids that end in [CPX], padded on either side, as the prompts before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.anatomy import Anatomy
from pliant.errors import InvalidInput
from pliant.prefill import Batch, align


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts without [CPX], aligned to the left."""

    batch: Batch
    empty: bool
    """Whether some have no token at all."""


def prompts_in(
    input_ids: Tensor, attention_mask: Tensor | None, cpx_token_id: int | None, anatomy: Anatomy
) -> Prompts:
    """Take the last token of each row off if it is [CPX]; anywhere else the id is an error."""
    batch = align(input_ids, attention_mask)
    ids_BT, mask_BT = batch.ids_BT, batch.mask_BT
    if cpx_token_id is not None and ids_BT.shape[1]:
        ends_B = (ids_BT[:, -1] == cpx_token_id) & (mask_BT[:, -1] != 0)
        mask_BT = torch.cat([mask_BT[:, :-1], mask_BT[:, -1:] * ~ends_B.unsqueeze(1)], dim=1)
    # Where nothing is read, an id of the vocabulary: the padding's own may lie outside.
    batch = align(ids_BT.masked_fill(mask_BT == 0, 0), mask_BT)
    _check_ids(batch, cpx_token_id, anatomy)
    batch = _begun(batch, anatomy)
    return Prompts(batch, empty=not all(batch.lengths))


def _begun(batch: Batch, anatomy: Anatomy) -> Batch:
    """A prompt of no token at all begins as any text does, where the model knows how."""
    bos = getattr(anatomy.config, "bos_token_id", None)
    lengths = batch.lengths
    if all(lengths) or not isinstance(bos, int) or bos < 0:
        return batch
    pairs = zip(batch.ids_BT, batch.mask_BT, strict=True)
    rows = [ids[mask != 0].tolist() or [bos] for ids, mask in pairs]
    return Batch.of(rows, device=batch.ids_BT.device)


def _check_ids(batch: Batch, cpx_token_id: int | None, anatomy: Anatomy) -> None:
    known = getattr(anatomy.embeddings, "num_embeddings", None)
    ids_BT = batch.ids_BT
    inside = ids_BT == cpx_token_id if cpx_token_id is not None else torch.zeros_like(ids_BT) != 0
    beyond = ids_BT >= known if isinstance(known, int) else torch.zeros_like(inside)
    for row in torch.nonzero((inside | beyond).any(dim=1)).flatten().tolist():
        found = ids_BT[row][(inside | beyond)[row]][0].item()
        if found == cpx_token_id:
            raise InvalidInput(
                f"prompt {row} holds [CPX] ({found}) before its end: it ends a prompt, once. If "
                "what follows is padding, pass the attention_mask"
            )
        raise InvalidInput(
            f"prompt {row} holds the id {found}, and the model has {known} embeddings: is it "
            f"another tokenizer's? (cpx_token_id is {cpx_token_id})"
        )
