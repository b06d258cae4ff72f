"""Questions of the nano world with their answers, as batches in which the answers have labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pliant import nano

Batch = dict[str, Tensor]


@torch.no_grad()
def answer_loss(model: Any, batches: list[Batch]) -> float:
    """The mean over labels, in the mode that the model is in."""
    total, count = 0.0, 0
    for batch in batches:
        labels = batch["labels"][:, 1:].flatten()
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += float(cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def answer_batches(
    tokenizer: Any, split: str, count: int, rows: int, seed: int = 1
) -> Iterator[Batch]:
    """Questions with their answers, which alone have labels."""
    asked = nano.questions(split, count * rows, seed)
    for start in range(0, len(asked), rows):
        yield padded(tokenizer, asked[start : start + rows])


def padded(tokenizer: Any, asked: list[nano.Question]) -> Batch:
    """One batch of these questions."""
    texts = [_tokens(tokenizer, question) for question in asked]
    longest = max(len(ids) for ids, _ in texts)
    rows = [(ids + [0] * (longest - len(ids)), prompt, len(ids)) for ids, prompt in texts]
    ids = torch.tensor([row for row, _, _ in rows])
    at = torch.arange(longest)
    mask = at < torch.tensor([[length] for _, _, length in rows])
    answer = mask & (at >= torch.tensor([[prompt] for _, prompt, _ in rows]))
    labels = ids.masked_fill(~answer, -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def _tokens(tokenizer: Any, question: Any) -> tuple[list[int], int]:
    turn = [{"role": "user", "content": question.prompt}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    turn.append({"role": "assistant", "content": question.answer})
    return tokenizer.apply_chat_template(turn, return_dict=False), len(prompt)
