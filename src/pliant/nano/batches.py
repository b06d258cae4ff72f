"""Questions as tensors: framed as a chat, grouped by length, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from transformers import PreTrainedTokenizerFast

from pliant.nano.question import Question
from pliant.nano.world import stream

_POOL = 16_384  # questions sorted by length together: little padding, and yet mixed batches


@dataclass(frozen=True)
class Batch:
    """Right-padded ids, and where to learn: `positions` are those whose next token is `targets`."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor


def batches(
    tokenizer: PreTrainedTokenizerFast, tokens: int, seed: int, start: int = 0
) -> Iterator[tuple[int, Batch]]:
    """Numbered batches of at most `tokens` padded tokens, without end, from number `start` on."""
    number = 0
    pool = 0
    while True:
        rng = random.Random(f"{seed}/{pool}")
        asked = list(islice(stream("train", seed=rng.getrandbits(48)), _POOL))
        groups = _by_length(frame(tokenizer, asked), tokens)
        rng.shuffle(groups)
        for group in groups:
            if number >= start:
                yield number, _collate(group, tokenizer.pad_token_id)
            number += 1
        pool += 1


def frame(
    tokenizer: PreTrainedTokenizerFast, asked: Sequence[Question]
) -> list[tuple[list[int], int]]:
    """For each question its ids, answer and end token included, and where the answer begins."""
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    prompts = tokenizer([q.prompt for q in asked])["input_ids"]
    answers = tokenizer([q.answer for q in asked])["input_ids"]
    framed = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [user, *prompt, assistant, *answer, tokenizer.eos_token_id]
        framed.append((ids, len(prompt) + 2))
    return framed


def _by_length(framed: list[tuple[list[int], int]], tokens: int) -> list[list]:
    groups: list[list] = [[]]
    for ids, start in sorted(framed, key=lambda item: len(item[0])):
        if (len(groups[-1]) + 1) * len(ids) > tokens and groups[-1]:
            groups.append([])
        groups[-1].append((ids, start))
    return groups


def _collate(group: list[tuple[list[int], int]], pad: int) -> Batch:
    width = max(len(ids) for ids, _ in group)
    rows = [ids + [pad] * (width - len(ids)) for ids, _ in group]
    positions, targets = [], []
    for row, (ids, start) in enumerate(group):
        for at in range(start, len(ids)):
            positions.append(row * width + at - 1)
            targets.append(ids[at])
    return Batch(torch.tensor(rows), torch.tensor(positions), torch.tensor(targets))
