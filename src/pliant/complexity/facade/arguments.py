"""The arguments of `CPXCausalLM`: checked, and prompts that end in [CPX] without it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.anatomy import Anatomy
from pliant.complexity.config import CPXConfig
from pliant.complexity.tokenizer import CPXTokenizer
from pliant.errors import InvalidInput, PliantError
from pliant.prefill import Batch, align


def tokenizer_of(where: str | Path, options: dict[str, Any]) -> CPXTokenizer | None:
    """The base's, with [CPX]; None where it has none that would do: ids can still be scored."""
    passed = {k: v for k, v in options.items() if k in ("revision", "trust_remote_code")}
    try:
        return CPXTokenizer.from_pretrained(where, **passed)
    except PliantError:
        return None


def config_of(config: CPXConfig | None, num_labels: int | None) -> CPXConfig:
    if config is None:
        return CPXConfig(num_labels=num_labels)
    if num_labels not in (None, config.num_labels):
        raise InvalidInput(f"num_labels={num_labels}, and the config has {config.num_labels}")
    return config


def check_same(
    saved: CPXConfig, config: CPXConfig | None, num_labels: int | None, folder: Path
) -> None:
    if num_labels not in (None, saved.num_labels) or config not in (None, saved):
        raise InvalidInput(
            f"{folder} holds a scorer with {saved.num_labels} outputs and settings of its own "
            "(pliant.json): leave num_labels and config out"
        )


def check_id(cpx_token_id: Any, tokenizer_size: int | None) -> None:
    advice = "make the tokenizer with CPXTokenizer.from_pretrained, and take both from it"
    if cpx_token_id is None:
        return
    if not isinstance(cpx_token_id, int) or isinstance(cpx_token_id, bool) or cpx_token_id < 0:
        raise InvalidInput(f"cpx_token_id={cpx_token_id!r} is no token's id: {advice}")
    if tokenizer_size is not None and cpx_token_id != tokenizer_size - 1:
        raise InvalidInput(
            f"cpx_token_id={cpx_token_id} is not the last id of tokenizer_size={tokenizer_size}, "
            f"as [CPX]'s is: {advice}"
        )


def check_known(cpx_token_id: int | None, tokenizer: CPXTokenizer | None) -> None:
    if None in (cpx_token_id, tokenizer):
        return
    assert tokenizer is not None and cpx_token_id is not None
    if cpx_token_id < tokenizer.cpx_token_id:
        raise InvalidInput(
            f"cpx_token_id={cpx_token_id} is {tokenizer.convert_ids_to_tokens(cpx_token_id)!r} in "
            f"the base's vocabulary; [CPX] is {tokenizer.cpx_token_id}: make the tokenizer with "
            "CPXTokenizer.from_pretrained"
        )


# --- prompts -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts without [CPX], aligned to the left."""

    batch: Batch
    empty: bool
    """Whether some have no token at all."""


def prompts_in(
    input_ids: Tensor, attention_mask: Tensor | None, cpx_token_id: int | None, anatomy: Anatomy
) -> Prompts:
    """Remove the last token of each row if it is [CPX]; anywhere else the id is an error."""
    batch = align(input_ids, attention_mask)
    ids_BT, mask_BT = batch.ids_BT, batch.mask_BT
    if cpx_token_id is not None and ids_BT.shape[1]:
        ends_B = (ids_BT[:, -1] == cpx_token_id) & (mask_BT[:, -1] != 0)
        mask_BT = torch.cat([mask_BT[:, :-1], mask_BT[:, -1:] * ~ends_B.unsqueeze(1)], dim=1)
    # Where nothing is read, an id of the vocabulary: the padding's own may lie outside.
    batch = align(ids_BT.masked_fill(mask_BT == 0, 0), mask_BT)
    _check_ids(batch, cpx_token_id, anatomy)
    batch = _with_beginnings(batch, anatomy)
    return Prompts(batch, empty=not all(batch.lengths))


def _with_beginnings(batch: Batch, anatomy: Anatomy) -> Batch:
    """An empty prompt becomes the token that begins a text, where the model has one."""
    bos = getattr(anatomy.config, "bos_token_id", None)
    lengths = batch.lengths
    if all(lengths) or not isinstance(bos, int) or bos < 0:
        return batch
    pairs = zip(batch.ids_BT, batch.mask_BT, strict=True)
    rows = [ids[mask != 0].tolist() or [bos] for ids, mask in pairs]
    return Batch.of(rows, device=batch.ids_BT.device)


def _check_ids(batch: Batch, cpx_token_id: int | None, anatomy: Anatomy) -> None:
    size = getattr(anatomy.embeddings, "num_embeddings", None)
    ids_BT = batch.ids_BT
    inside = ids_BT == cpx_token_id if cpx_token_id is not None else torch.zeros_like(ids_BT) != 0
    beyond = ids_BT >= size if isinstance(size, int) else torch.zeros_like(inside)
    for row in torch.nonzero((inside | beyond).any(dim=1)).flatten().tolist():
        token = ids_BT[row][(inside | beyond)[row]][0].item()
        if token == cpx_token_id:
            raise InvalidInput(
                f"prompt {row} holds [CPX] ({token}) before its end: it ends a prompt, once. If "
                "what follows is padding, pass the attention_mask"
            )
        raise InvalidInput(
            f"prompt {row} holds the id {token}, and the model has {size} embeddings: is it "
            f"another tokenizer's? (cpx_token_id is {cpx_token_id})"
        )
