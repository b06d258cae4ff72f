"""Checks the arguments of `CPXCausalLM`, and removes the [CPX] that ends its prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from pliant.complexity.config import CPXConfig
from pliant.complexity.prompts import checked, unpadded
from pliant.complexity.scorer import PromptScorer
from pliant.complexity.tokenizer import CPXTokenizer
from pliant.errors import InvalidInput, PliantError
from pliant.prefill import Batch


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


def prompts_in(
    input_ids: Tensor, attention_mask: Tensor | None, cpx_token_id: int | None, scorer: PromptScorer
) -> Batch:
    """The prompts without their trailing [CPX]; anywhere else its id is an error."""
    rows = unpadded(input_ids, attention_mask)
    rows = [row[:-1] if row and row[-1] == cpx_token_id else row for row in rows]
    for i, row in enumerate(rows):
        if cpx_token_id in row:
            raise InvalidInput(
                f"prompt {i} holds [CPX] ({cpx_token_id}) before its end: it ends a prompt, once. "
                "If what follows is padding, pass the attention_mask"
            )
    vocabulary = getattr(scorer.anatomy.embeddings, "num_embeddings", None)
    rows = checked(rows, None, None, vocabulary)
    return Batch.of(scorer.with_beginnings(rows), device=input_ids.device)
