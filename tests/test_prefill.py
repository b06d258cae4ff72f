"""A batch of prompts is run once; what is put on top of it leaves it as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.minimal_adapter import tiny_llama
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from pliant.anatomy import Anatomy
from pliant.anatomy.tiny import causal_lm_types, tiny_model
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.prefill import (
    Batch,
    Prefilled,
    align,
    on_top,
    prefill,
    supports_cache,
    supports_padding,
)

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [19, 20, 21, 22, 23]]
NEW = torch.tensor([[30, 31], [32, 33], [34, 35]])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama(num_hidden_layers=4)


@pytest.fixture(scope="module")
def ran(model: PreTrainedModel) -> Prefilled:
    return prefill(model, *padded(PROMPTS, "right"))


def padded(prompts: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    gaps = [[0] * (longest - len(p)) for p in prompts]
    rows = zip(prompts, gaps, strict=True)
    left = side == "left"
    ids = [gap + p if left else p + gap for p, gap in rows]
    mask = [
        g + [1] * len(p) if left else [1] * len(p) + g for p, g in zip(prompts, gaps, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


@torch.no_grad()
def alone(model: Any, prompt: list[int], new: list[int], layers: int | None = None) -> Tensor:
    """What the new positions come to in one forward over this prompt and them."""
    return on_top(Anatomy.of(model), Batch.of([prompt]), torch.tensor([new]), layers=layers)[0]


# --- batches --------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_aligned_prompts_are_the_prompts(prompts: list[list[int]], data: Any) -> None:
    """Whatever holes the mask has: tokens keep their order, and end at the last position."""
    width = max(map(len, prompts)) + data.draw(st.integers(0, 3))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        at = sorted(data.draw(st.permutations(range(width)))[: len(prompt)])
        ids[row, at] = torch.tensor(prompt, dtype=torch.long)
        mask[row, at] = 1
    batch = align(ids, mask)
    assert batch.ids_BT.shape[1] == max(map(len, prompts))
    for row, prompt in enumerate(prompts):
        length = len(prompt)
        assert batch.ids_BT[row, batch.ids_BT.shape[1] - length :].tolist() == prompt
        assert batch.mask_BT[row].tolist() == [0] * (batch.ids_BT.shape[1] - length) + [1] * length
    assert torch.equal(Batch.of(prompts).mask_BT, batch.mask_BT)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(3), None, "integers of shape"),
        (torch.zeros(2, 3), None, "integers of shape"),
        (torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4), "must be the same"),
    ],
)
def test_invalid_batches_are_refused(ids: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        align(ids, mask)


# --- a run ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_and_hidden_are_the_models_own(model: PreTrainedModel, ran: Prefilled) -> None:
    ids, mask = padded(PROMPTS, "left")
    where = (mask.cumsum(1) - 1).clamp(min=0)
    own = model(input_ids=ids, attention_mask=mask, position_ids=where, output_hidden_states=True)
    assert torch.equal(ran.logits, own.logits[:, -1])
    assert torch.equal(ran.hidden, own.hidden_states[-1][:, -1])
    assert torch.equal(ran.input_ids, ids) and torch.equal(ran.attention_mask, mask)


def test_padding_may_be_on_either_side(model: PreTrainedModel, ran: Prefilled) -> None:
    left = prefill(model, *padded(PROMPTS, "left"))
    assert torch.equal(left.logits, ran.logits)
    assert torch.equal(left.step(NEW), ran.step(NEW))


@torch.no_grad()
def test_a_step_is_one_forward_over_everything(model: PreTrainedModel, ran: Prefilled) -> None:
    stepped = ran.step(NEW)
    for row, prompt in enumerate(PROMPTS):
        whole = alone(model, prompt, NEW[row].tolist())
        assert torch.allclose(stepped[row], whole, atol=1e-5)


@torch.no_grad()
def test_after_a_step_the_cache_is_as_before(model: PreTrainedModel) -> None:
    """Generation goes on from it as if there had been none, bit for bit."""
    batch = padded(PROMPTS, "left")
    ran, untouched = prefill(model, *batch), prefill(model, *batch)
    first = ran.step(NEW)
    assert torch.equal(ran.step(NEW), first)
    held = [layer.keys.clone() for layer in ran.cache.layers]
    assert all(torch.equal(a, b.keys) for a, b in zip(held, untouched.cache.layers, strict=True))


def test_gradients_reach_what_a_hook_writes_and_nothing_else(
    model: PreTrainedModel, ran: Prefilled
) -> None:
    row = torch.zeros(16, requires_grad=True)
    hook = model.get_input_embeddings().register_forward_hook(lambda *_: row.expand(3, 1, 16))
    ran.step(NEW[:, :1]).square().sum().backward()
    hook.remove()
    assert row.grad is not None and row.grad.any()
    keys = ran.cache.layers[0].keys
    assert not keys.requires_grad


def test_without_a_head_there_are_no_logits(model: PreTrainedModel, ran: Prefilled) -> None:
    seen: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    headless = prefill(model, *padded(PROMPTS, "left"), head=False)
    hook.remove()
    assert headless.logits is None and seen == []
    assert torch.equal(headless.hidden, ran.hidden)


@pytest.mark.parametrize("shape", [(2, 1), (3, 0), (3,)])
def test_a_step_of_another_batch_is_refused(ran: Prefilled, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="ids must be of shape"):
        ran.step(torch.zeros(shape, dtype=torch.long))


# --- early exit -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 2, 4])
def test_stopped_early_it_steps_and_resumes(model: PreTrainedModel, ran: Prefilled, k: int) -> None:
    early = prefill(model, *padded(PROMPTS, "right"), layers=k)
    assert early.logits is None
    stepped = early.step(NEW)
    for row, prompt in enumerate(PROMPTS):
        whole = alone(model, prompt, NEW[row].tolist(), layers=k)
        assert torch.allclose(stepped[row], whole, atol=1e-5)
    resumed = early.resume()
    assert torch.equal(resumed.logits, ran.logits) and torch.equal(resumed.hidden, ran.hidden)
    assert torch.equal(resumed.step(NEW), ran.step(NEW))
    assert resumed.resume() is resumed
    headless = early.resume(head=False)
    assert headless.logits is None and torch.equal(headless.hidden, ran.hidden)
    assert torch.equal(headless.step(NEW), ran.step(NEW))


def test_a_prefill_that_is_not_resumable_raises(model: PreTrainedModel) -> None:
    early = prefill(model, *padded(PROMPTS, "left"), layers=1, resumable=False)
    with pytest.raises(InvalidInput, match="resumable"):
        early.resume()


# --- prefixes -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 1, 0], [0, 1, 2]])
def test_prefixes_join_to_any_batch(
    model: PreTrainedModel, rows: list[int], layers: int | None
) -> None:
    ran = prefill(model, *padded(PROMPTS, "right"), layers=layers)
    prefixes = ran.split()
    assert [prefix.length for prefix in prefixes] == [3, 11, 5]
    joined = Prefilled.join(model, [prefixes[row] for row in rows], layers=layers)
    stepped = joined.step(NEW[rows])
    assert joined.hidden is None and joined.logits is None
    assert torch.allclose(stepped, ran.step(NEW)[rows], atol=1e-5)


@torch.no_grad()
def test_prefixes_longer_than_a_window_are_the_window() -> None:
    model = tiny_model("mistral")  # a window of 8
    ran = prefill(model, *padded(PROMPTS, "right"))
    prefixes = ran.split()
    stored = {prefix.length: prefix.tensors[0].shape[1] for prefix in prefixes}
    assert stored == {3: 3, 11: model.config.sliding_window - 1, 5: 5}
    for row, prefix in enumerate(prefixes):
        stepped = Prefilled.join(model, [prefix]).step(NEW[row : row + 1])[0]
        assert torch.allclose(stepped, ran.step(NEW)[row], atol=1e-5)
    assert torch.allclose(Prefilled.join(model, prefixes).step(NEW), ran.step(NEW), atol=1e-5)


def test_a_prefix_takes_no_more_than_its_prompt(ran: Prefilled) -> None:
    heads, width, layers = 1, 8, 4
    for prefix in ran.split():
        assert prefix.bytes == 2 * layers * heads * prefix.length * width * 4
        assert all(t.untyped_storage().nbytes() == t.numel() * 4 for t in prefix.tensors)


def test_a_state_that_cannot_be_taken_apart_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="LinearAttentionLayer"):
        prefill(tiny_model("mamba"), *padded(PROMPTS, "left")).split()


def test_prefixes_of_two_depths_do_not_join(model: PreTrainedModel, ran: Prefilled) -> None:
    early = prefill(model, *padded(PROMPTS, "left"), layers=1)
    with pytest.raises(InvalidInput, match="cannot be joined"):
        Prefilled.join(model, [ran.split()[0], early.split()[0]])
    with pytest.raises(InvalidInput, match="at least one"):
        Prefilled.join(model, [])


# --- models that need something else --------------------------------------------------------------


def test_trials_of_several_models() -> None:
    verdicts = {
        name: (supports_cache(Anatomy.of(model)), supports_padding(Anatomy.of(model)))
        for name in ("llama", "bart", "openai-gpt", "mamba")
        for model in (tiny_model(name),)
    }
    assert verdicts == {
        "llama": (True, True),
        "bart": (True, False),
        "openai-gpt": (False, True),
        "mamba": (True, True),
    }


@pytest.mark.parametrize("name", ["axk2", "deepseek_v32", "dots3_note", "glm_moe_dsa", "hy_v4"])
def test_a_cache_of_sparse_attention_is_not_supported(name: str) -> None:
    """Small and random as they are, which positions are chosen depends on padding and cache."""
    if name not in causal_lm_types():
        pytest.skip("this transformers does not know the type")
    anatomy = Anatomy.of(tiny_model(name))
    assert not supports_cache(anatomy) and not supports_padding(anatomy)


def test_a_model_of_a_short_context_is_tried_on_less() -> None:
    config = GPT2Config(n_positions=20, n_embd=16, n_layer=2, n_head=2, vocab_size=64)
    anatomy = Anatomy.of(GPT2LMHeadModel(config).eval())
    assert supports_cache(anatomy) and supports_padding(anatomy)


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("name", ["bart", "openai-gpt", "mamba", "qwen3_next", "deepseek_v4"])
def test_whatever_the_model_a_prompt_gives_what_it_gives_alone(
    name: str, layers: int | None
) -> None:
    model = tiny_model(name)
    ran = prefill(model, *padded(PROMPTS, "right"), layers=layers)
    stepped = ran.step(NEW)
    for row, prompt in enumerate(PROMPTS):
        whole = alone(model, prompt, NEW[row].tolist(), layers=layers)
        assert torch.allclose(stepped[row], whole, atol=1e-4)
    assert torch.equal(ran.step(NEW), stepped)


@torch.no_grad()
@pytest.mark.parametrize("checkpointing", [False, True], ids=["dropout", "checkpointing"])
def test_a_model_in_training_is_tried_at_rest(checkpointing: bool) -> None:
    model = tiny_llama(attention_dropout=0.5)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    before = torch.get_rng_state()
    assert supports_cache(Anatomy.of(model)) and supports_padding(Anatomy.of(model))
    assert model.training and all(layer.training for layer in model.model.layers)
    assert torch.equal(torch.get_rng_state(), before)


def test_groups_of_one_length_come_back_in_order() -> None:
    model = tiny_model("bart")
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[2], [7, 6, 5]]
    ran = prefill(model, *padded(prompts, "left"))
    hidden = torch.cat([prefill(model, torch.tensor([p])).hidden for p in prompts])
    assert torch.allclose(ran.hidden, hidden, atol=1e-5)
    prefixes = ran.split()
    assert [prefix.length for prefix in prefixes] == [11, 3, 5, 3]
    new = torch.tensor([[30], [31], [32], [33]])
    joined = Prefilled.join(model, prefixes)
    assert torch.allclose(joined.step(new), ran.step(new), atol=1e-5)
    with pytest.raises(UnsupportedModel, match="does not support padding"):
        _ = ran.cache


def test_gradients_flow_through_a_state_that_is_written_in_place() -> None:
    model = tiny_model("mamba").requires_grad_(False)
    ran = prefill(model, torch.tensor([PROMPTS[1]]))
    rows = torch.randn(1, 2, 64, requires_grad=True)
    at = iter((0, 1, 0, 1))
    table = model.get_input_embeddings()

    def write(_: Any, __: Any, out: Tensor) -> Tensor:
        i = next(at)
        return rows[:, i : i + 1]

    hook = table.register_forward_hook(write)
    (on_cache,) = torch.autograd.grad(ran.step(NEW[:1]).sum(), rows)
    hook.remove()

    def append(_: Any, __: Any, out: Tensor) -> Tensor:
        return torch.cat([out[:, :-2], rows], dim=1)

    hook = table.register_forward_hook(append)
    whole = on_top(Anatomy.of(model), Batch.of([PROMPTS[1]]), NEW[:1])
    hook.remove()
    (at_once,) = torch.autograd.grad(whole.sum(), rows)
    assert torch.allclose(on_cache, at_once, atol=1e-5)
