"""Calibration text: batches of it, their losses, and which of their tokens are no padding.

    batches = calibration_batches(read_rows("notes.txt"), tokenizer, tokens=8192, length=256)

B sequences of T tokens; a position predicts the next token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from pliant.anatomy.find import device_of
from pliant.anatomy.modes import eval_mode
from pliant.data import Row
from pliant.data.collate import IGNORED, Collator
from pliant.errors import InvalidInput, UnsupportedModel, check_whole

Batch = Mapping[str, Any]
"""`input_ids`, and optionally `attention_mask`, `labels` and other inputs of the model."""


def calibration_batches(
    source: str | Sequence[str] | Sequence[Row],
    tokenizer: Any,
    *,
    tokens: int = 8192,
    length: int = 256,
    rows: int = 8,
) -> list[dict[str, Tensor]]:
    """At least `tokens` tokens of texts or rows, as batches of `rows` sequences of `length` tokens.

    Rows are read as training reads them: `text`, `prompt` and `completion`, or `messages`. The
    sequences are spread evenly over the source.
    """
    check_whole("tokens", tokens, 1)
    check_whole("length", length, 2)
    check_whole("rows", rows, 1)
    source = [source] if isinstance(source, str) else source
    table: list[Row] = [{"text": x} if isinstance(x, str) else x for x in source]
    from pliant.training.texts import texts  # with a Trainer, which imports bitsandbytes

    pieces = texts(table, tokenizer, length).pieces
    available = sum(len(piece["input_ids"]) for piece in pieces)
    if available < tokens:
        raise InvalidInput(
            f"the calibration text is too short: it has {available:,} tokens, and {tokens:,} are "
            f"needed. Give more text, or tokens={available}"
        )
    chosen = _spread(pieces, tokens)
    collate = Collator.of(tokenizer)
    return [collate(chosen[i : i + rows]) for i in range(0, len(chosen), rows)]


def _spread(pieces: list[dict[str, list[int]]], tokens: int) -> list[dict[str, list[int]]]:
    """The fewest evenly spaced pieces that hold so many tokens."""
    lengths = [len(piece["input_ids"]) for piece in pieces]
    count = max(1, tokens * len(pieces) // sum(lengths))
    while True:
        at = [i * len(pieces) // count for i in range(count)]
        if count == len(pieces) or sum(lengths[i] for i in at) >= tokens:
            return [pieces[i] for i in at]
        count += 1


@dataclass(frozen=True, eq=False)
class Sample:
    """A batch as the model is called with it."""

    inputs: dict[str, Any]
    targets_BT: Tensor
    """What each position predicts; IGNORED where nothing counts."""
    mask_BT: Tensor
    """False on padding."""

    def sequences(self) -> list[Sample]:
        """Each sequence as a batch of its own."""
        count = len(self.targets_BT)
        return [
            Sample(
                {k: _row(v, i, count) for k, v in self.inputs.items()},
                self.targets_BT[i : i + 1],
                self.mask_BT[i : i + 1],
            )
            for i in range(count)
        ]


def _row(value: Any, i: int, count: int) -> Any:
    is_batch = isinstance(value, Tensor) and value.dim() > 0 and len(value) == count
    return value[i : i + 1] if is_batch else value


def samples_of(batches: Iterable[Batch], device: torch.device) -> list[Sample]:
    """The batches on the model's device, checked."""
    samples = [_sample(batch, device) for batch in batches]
    if samples and not any(bool((sample.targets_BT != IGNORED).any()) for sample in samples):
        raise InvalidInput("no token of the calibration batches has a label to predict")
    return samples


def _sample(batch: Batch, device: torch.device) -> Sample:
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        names = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise InvalidInput(f"a calibration batch needs input_ids, and has {names}")
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    ids, labels = inputs["input_ids"], inputs.pop("labels", None)
    labels = ids if labels is None else labels
    mask = inputs.pop("attention_mask", None)
    mask_BT = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if ids.dim() != 2 or mask_BT.shape != ids.shape or labels.shape != ids.shape:
        raise InvalidInput(
            f"input_ids of shape {tuple(ids.shape)}, attention_mask {tuple(mask_BT.shape)} and "
            f"labels {tuple(labels.shape)}: give each as (sequences, tokens)"
        )
    if not mask_BT.all():
        inputs["attention_mask"] = mask_BT.long()
    counts = mask_BT[:, :-1] & mask_BT[:, 1:]
    targets_BT = pad(labels[:, 1:].where(counts, IGNORED), (0, 1), value=IGNORED)
    return Sample({"use_cache": False, **inputs}, targets_BT, mask_BT)


def sequence_losses(model: nn.Module, sample: Sample, **options: Any) -> Tensor:
    """(B,) each sequence's loss, summed over its tokens."""
    logits_BTV = model(**sample.inputs, **options).logits
    # One sequence at a time: the logits in fp32 are the largest tensor of all.
    losses = [
        cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
        for logits, targets in zip(logits_BTV, sample.targets_BT, strict=True)
    ]
    return torch.stack(losses)


@torch.no_grad()
def perplexity(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Of the batches' labels, or of every token after the first."""
    samples = samples_of(batches, device_of(model))
    with eval_mode(model):
        losses = sum(float(sequence_losses(model, sample).sum()) for sample in samples)
    return math.exp(min(losses / predicted(samples), 700.0))


def predicted(samples: Iterable[Sample]) -> int:
    """How many tokens the losses are summed over."""
    return sum(int((sample.targets_BT != IGNORED).sum()) for sample in samples)


def without_padding(x: Tensor, mask_BT: Tensor) -> Tensor:
    """(tokens, features) of (..., features), however the batch is laid out before the features."""
    if mask_BT.all():
        return x.reshape(-1, x.shape[-1])
    if x.numel() % (mask_BT.numel() * x.shape[-1]):
        raise UnsupportedModel(
            f"a module of the model computes a tensor of shape {tuple(x.shape)} for "
            f"{tuple(mask_BT.shape)} tokens, so its padding cannot be identified: give batches "
            "without padding"
        )
    # Gemma 3n's layers have several streams before the sequences.
    stacked = x.reshape(-1, mask_BT.numel(), x.shape[-1])
    return stacked[:, mask_BT.flatten()].flatten(0, 1)


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module is given inside the block, a tensor for each call."""
    seen: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args or tuple(kwargs.values()))[0])

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def digest(samples: Iterable[Sample]) -> str:
    """Identifies the tokens and what is predicted of them."""
    content = hashlib.sha256()
    for sample in samples:
        for tensor in (sample.inputs["input_ids"], sample.targets_BT, sample.mask_BT):
            content.update(tensor.cpu().numpy().tobytes())
    return content.hexdigest()[:16]
