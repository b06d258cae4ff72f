"""Greedy answers to many prompts at once, through the chat template and plain `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LONGEST_ANSWER = 24  # tokens: the longest right answer has 22 letters and an end
_TOKENS_A_BATCH = 8_192


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[str]:
    """One answer a prompt. Prompts of like length share a batch, so little is spent on padding."""
    found = [""] * len(prompts)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    for rows in _alike([len(text) for text in texts]):
        batch = tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True)
        out = model.generate(
            **batch.to(model.device), max_new_tokens=_LONGEST_ANSWER, do_sample=False
        )
        said = tokenizer.batch_decode(
            out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, text in zip(rows, said, strict=True):
            found[i] = text
    return found


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    rows: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if rows and (len(rows) + 1) * lengths[i] > _TOKENS_A_BATCH:
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows
