"""Answers: sampled in groups that share a prefill, and greedy ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.experts.training.runs import ROWS, model, set_z, tokenizer, trainer
from transformers import GenerationConfig, LlamaModel

from pliant.experts.training.answers import greedy_answers, sample_groups, up_to_end
from pliant.experts.training.task import encode

HOW = GenerationConfig(max_new_tokens=7, do_sample=True, pad_token_id=256, eos_token_id=[257])


def prompts() -> list[list[int]]:
    return encode(ROWS[:5], tokenizer(), chat=False).ids


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = [[256] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def test_groups_that_share_a_prefill_are_what_generate_samples() -> None:
    base = model()
    torch.manual_seed(0)
    shared = sample_groups(base, prompts(), 3, HOW)
    torch.manual_seed(0)
    repeated = padded([prompt for prompt in prompts() for _ in range(3)])
    out = base.generate(**repeated, generation_config=HOW)
    assert shared == up_to_end(out[:, repeated["input_ids"].shape[1] :], [257])
    assert len({tuple(answer) for answer in shared}) > 10


def test_each_prompt_is_prefilled_once(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path)
    sizes: list[tuple[int, ...]] = []
    forward = LlamaModel.forward

    def watch(self: Any, input_ids: Any = None, **more: Any) -> Any:
        sizes.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **more)

    ids = [ids for ids in prompts()[:4] for _ in range(4)]
    run._sampled(ids)  # the model's cache is tried out
    monkeypatch.setattr(LlamaModel, "forward", watch)
    run._sampled(ids)
    assert sizes[0] == (4, max(map(len, ids)) - 1) and set(sizes[1:]) == {(16, 1)}


def test_a_prompt_of_one_token_has_nothing_to_share() -> None:
    assert sample_groups(model(), [[5], [6, 7]], 2, HOW) is None


def test_an_answer_ends_with_its_first_end_token() -> None:
    ids = torch.tensor([[5, 257, 9, 257], [258, 1, 1, 1], [5, 6, 7, 8]])
    assert up_to_end(ids, [257, 258]) == [[5, 257], [258], [5, 6, 7, 8]]


def test_greedy_answers_come_in_order_whatever_the_lengths(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pliant.experts.training import answers

    run = trainer(tmp_path)
    set_z(run.model)
    monkeypatch.setattr(answers, "TOKENS_A_BATCH", 60)
    together = greedy_answers(run.model, prompts(), 6, tokenizer())
    alone = [greedy_answers(run.model, [ids], 6, tokenizer())[0] for ids in prompts()]
    assert together == alone and all(together)
