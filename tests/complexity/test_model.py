"""A scorer beside its base: exact counts, nothing of the base touched, one score however asked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from tests.minimal_adapter import anatomy_of, logits, same_anatomy, tiny_llama, trained
from torch import Tensor, nn
from transformers import PreTrainedModel

from pliant.adapters import attached
from pliant.anatomy.tiny import tiny_model
from pliant.complexity import Complexity, CPXConfig, attach
from pliant.errors import AdapterError, InvalidInput, WrongBase
from pliant.prefill import Batch, Prefilled, prefill, supports_cache, supports_padding

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [16], [20, 21, 22, 23]]
D, LAYERS = 16, 2


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_llama()


def made(model: nn.Module, **settings: Any) -> Complexity:
    return trained(attach(model, CPXConfig(**settings)))


# --- what is trained ------------------------------------------------------------------------------

# q and o: 16 -> 16; k and v: 16 -> 8; gate and up: 16 -> 32; down: 32 -> 16.
LORA = LAYERS * (2 * (16 + 16) + 2 * (16 + 8) + 2 * (16 + 32) + (32 + 16))
COUNTS = [
    ({}, D + D + 1),
    ({"bias": False}, D + D),
    ({"rows": 3}, 3 * D + D + 1),
    ({"num_labels": 4}, D + 4 * D + 4),
    ({"rows": 2, "aggregation": "mean"}, 2 * D + D + 1),
    ({"rows": 2, "aggregation": "attention"}, 2 * D + D + 1 + D),
    ({"lora_rank": 3}, D + D + 1 + 3 * LORA),
    ({"lora_rank": 3, "layer": 1}, D + D + 1 + 3 * LORA // LAYERS),
    ({"lora_rank": 2, "lora_targets": ("q_proj", "v_proj")}, D + D + 1 + 2 * 2 * (32 + 24)),
]


@pytest.mark.parametrize(("settings", "count"), COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainable_numbers_are_counted_exactly(
    settings: dict[str, Any], count: int, dtype: torch.dtype
) -> None:
    model = tiny_llama().to(dtype).requires_grad_(False)
    scorer = attach(model, CPXConfig(**settings))
    learned = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learned) == count
    assert {p.dtype for p in learned} == {torch.float32}
    assert {id(p) for p in learned} == {id(p) for p in scorer.parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_and_optimizer_states_are_of_that_size(dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype).requires_grad_(False)
    scorer = attach(model, CPXConfig(rows=2, aggregation="attention"))
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-2)
    for _ in range(2):  # a head at zero passes nothing on in the first step
        optimizer.zero_grad()
        scorer.logits(torch.tensor([PROMPTS[1]])).square().sum().sub(1).square().backward()
        optimizer.step()
    numbers = 2 * D + D + 1 + D
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert sum(t.numel() * t.element_size() for t in moments) == 2 * 4 * numbers
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert sum(g.numel() * g.element_size() for g in gradients) == 4 * numbers


def test_even_a_base_that_is_not_frozen_gets_no_gradient_of_its_vocabulary(
    model: PreTrainedModel,
) -> None:
    scorer = made(model)
    scorer.logits(torch.tensor(PROMPTS[:1])).sum().backward()
    assert model.get_input_embeddings().weight.grad is None
    assert scorer.rows.grad is not None and scorer.rows.grad.any()


def test_rows_start_as_embeddings_and_tell_each_other_apart() -> None:
    model = tiny_model("gemma3_text")  # its embedding module scales what it looks up
    rows = attach(model, CPXConfig(rows=64)).rows
    known = model.get_input_embeddings()(torch.arange(100))
    assert rows.mean().item() == pytest.approx(known.mean().item(), abs=0.1)
    assert rows.std().item() == pytest.approx(known.std().item(), rel=0.2)
    assert len(rows.detach().unique(dim=0)) == 64


def test_untrained_it_says_one_half(model: PreTrainedModel) -> None:
    assert attach(model, CPXConfig(lora_rank=2)).score(PROMPTS).score.tolist() == [0.5] * 4


# --- neutral is invisible -------------------------------------------------------------------------


def test_attached_and_not_asked_the_base_is_bit_identical(model: PreTrainedModel) -> None:
    before, anatomy = logits(model), anatomy_of(model)
    scorer = made(model, rows=2, lora_rank=2)
    assert torch.equal(logits(model), before)
    scorer.score(PROMPTS)
    scorer.generate(PROMPTS, max_new_tokens=2)
    assert torch.equal(logits(model), before)
    scorer.detach()
    assert same_anatomy(anatomy_of(model), anatomy)


def test_a_scorer_that_was_detached_can_be_attached_again(model: PreTrainedModel) -> None:
    from pliant.adapters import attach as attach_again

    scorer = made(model, lora_rank=2)
    before = scorer.score(PROMPTS).logits
    scorer.detach()
    assert np.array_equal(attach_again(model, scorer).score(PROMPTS).logits, before)


def test_a_copied_model_has_a_scorer_of_its_own(model: PreTrainedModel) -> None:
    scorer = made(model, lora_rank=2)
    twin = copy.deepcopy(model)
    own = attached(twin)["complexity"]
    assert isinstance(own, Complexity)
    before = scorer.score(PROMPTS).logits
    assert np.array_equal(own.score(PROMPTS).logits, before)
    with torch.no_grad():
        own.rows.add_(1.0)
    assert np.array_equal(scorer.score(PROMPTS).logits, before)
    assert not np.allclose(own.score(PROMPTS).logits, before)


def test_a_compiled_base_is_one_graph_while_nobody_asks(model: PreTrainedModel) -> None:
    scorer = made(model, rows=2, lora_rank=2)
    before, scores = logits(model), scorer.score(PROMPTS).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled), before)
    assert np.array_equal(scorer.score(PROMPTS).logits, scores)
    assert torch.equal(logits(compiled), before)


def test_disabled_it_does_not_pretend_to_score(model: PreTrainedModel) -> None:
    scorer = made(model)
    with scorer.disabled(), pytest.raises(AdapterError, match="disabled in this thread"):
        scorer.score(PROMPTS)
    assert len(scorer.score(PROMPTS)) == 4


# --- one score, however it is asked ---------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {},
    {"rows": 3, "aggregation": "mean"},
    {"rows": 3, "aggregation": "max"},
    {"rows": 3, "aggregation": "attention"},
    {"rows": 3, "lora_rank": 2},
    {"layer": 1},
    {"layer": 1, "rows": 2, "lora_rank": 2, "outputs": ("score", "gain")},
]


@pytest.mark.parametrize("settings", KINDS)
def test_batches_padding_and_caches_make_no_difference(
    model: PreTrainedModel, settings: dict[str, Any]
) -> None:
    scorer = made(model, **settings)
    expected = np.concatenate([scorer.score([prompt]).logits for prompt in PROMPTS])
    assert expected.std(axis=0).min() > 1e-3  # prompts do differ
    for batch_size in (None, 1, 2, 9):
        scores = scorer.score(PROMPTS, batch_size=batch_size).logits
        assert scores == pytest.approx(expected, abs=1e-5)
    for side in ("left", "right"):
        ids, mask = padded(PROMPTS, side)
        assert as_array(scorer.logits(ids, mask)) == pytest.approx(expected, abs=1e-5)
        with torch.no_grad():
            assert as_array(scorer.logits(ids, mask)) == pytest.approx(expected, abs=1e-5)
    ran = prefill(model, *padded(PROMPTS, "right"), layers=scorer.config.layer)
    joined = Prefilled.join(model, ran.split(), layers=scorer.config.layer)
    assert as_array(scorer.logits_of(ran)) == pytest.approx(expected, abs=1e-5)
    assert as_array(scorer.logits_of(joined)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("settings", KINDS)
def test_gradients_are_those_of_one_forward_over_prompt_and_rows(
    model: PreTrainedModel, settings: dict[str, Any]
) -> None:
    scorer = made(model, **settings)
    ids, mask = padded(PROMPTS, "left")
    learned = list(scorer.parameters())
    on_cache = torch.autograd.grad(scorer.logits(ids, mask).square().sum(), learned)
    at_once = scorer.logits_at_once(Batch(ids, mask))
    for ours, theirs in zip(
        on_cache, torch.autograd.grad(at_once.square().sum(), learned), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bart", "deepseek_v4"])
def test_where_padding_is_not_borne_prompts_run_by_length(kind: str) -> None:
    scorer = made(tiny_model(kind), rows=2)
    prompts = [[*range(5, 5 + length)] for length in (13, 20, 15)]
    alone = [scorer.score([prompt]).logits[0, 0] for prompt in prompts]
    assert scorer.score(prompts).logits[:, 0] == pytest.approx(alone, abs=1e-4)


def test_a_prompt_without_a_token_scores_beside_others_as_alone(model: PreTrainedModel) -> None:
    scorer = made(model.requires_grad_(False))
    ids, mask = torch.tensor([[0, 0], [5, 6]]), torch.tensor([[0, 0], [1, 1]])
    nothing = torch.zeros(1, 0, dtype=torch.long)
    alone = torch.cat([scorer.logits(nothing), scorer.logits(ids[1:])])
    assert torch.allclose(scorer.logits(ids, mask), alone, atol=1e-5)
    assert alone.requires_grad


def test_the_whole_prompt_learns_where_that_is_asked_for(model: PreTrainedModel) -> None:
    scorer = made(model)
    ids, weight = torch.tensor([PROMPTS[1]]), model.model.layers[0].mlp.up_proj.weight
    (gradient,) = torch.autograd.grad(scorer.logits(ids, whole=True).sum(), weight)
    (whole,) = torch.autograd.grad(scorer.logits_at_once(Batch.of([PROMPTS[1]])).sum(), weight)
    (rows_only,) = torch.autograd.grad(scorer.logits(ids).sum(), weight)
    assert torch.equal(gradient, whole) and not torch.allclose(gradient, rows_only, rtol=0.1)


@pytest.mark.parametrize("ids", [[5, 64], [5, -1]])
def test_ids_of_another_vocabulary_are_refused(model: PreTrainedModel, ids: list[int]) -> None:
    scorer = made(model)
    for ask in (scorer.score, scorer.generate):
        with pytest.raises(InvalidInput, match="prompt 1 holds ids"):
            ask([[5], ids])


def test_rows_follow_the_prompt_and_their_order_counts(model: PreTrainedModel) -> None:
    scorer = made(model, rows=2)
    before = scorer.score(PROMPTS).logits
    with torch.no_grad():
        scorer.rows.copy_(scorer.rows.flip(0))
    assert not np.allclose(scorer.score(PROMPTS).logits, before)


def test_bf16_scores_are_the_fp32_scores_rounded() -> None:
    model = tiny_llama()
    scorer = made(model, rows=2)
    exact = scorer.score(PROMPTS).score
    model.to(torch.bfloat16)
    assert scorer.rows.dtype == torch.float32
    assert scorer.score(PROMPTS).score == pytest.approx(exact, abs=0.02)


def test_a_layer_that_is_not_read_is_not_run(model: PreTrainedModel) -> None:
    scorer = made(model, layer=1)
    # Tried once a model, with forwards of their own.
    assert supports_cache(scorer.anatomy) and supports_padding(scorer.anatomy)
    ran: list[int] = []
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: ran.append(1))
    scorer.score(PROMPTS)
    scorer.logits(torch.tensor(PROMPTS[:1])).sum().backward()
    hook.remove()
    assert ran == []


def test_two_scorers_on_one_model_do_not_meet(model: PreTrainedModel) -> None:
    one = made(model, rows=2, lora_rank=2)
    before = one.score(PROMPTS).logits
    other = trained(attach(model, CPXConfig(lora_rank=2), name="other"), seed=5)
    assert np.array_equal(one.score(PROMPTS).logits, before)
    assert not np.allclose(other.score(PROMPTS).logits, before)


def test_gradient_checkpointing_is_left_as_it_is_and_not_used(model: PreTrainedModel) -> None:
    """It would run layers again in the backward pass, when nobody is asking any more."""
    scorer = made(model, rows=2, lora_rank=2)
    ids, learned = torch.tensor(PROMPTS[1:2]), list(scorer.parameters())
    expected = torch.autograd.grad(scorer.logits(ids).sum(), learned)
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
    model.train()
    gradients = torch.autograd.grad(scorer.logits(ids).sum(), learned)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


@pytest.mark.parametrize("how", ["to the processor", "to the disk"])
def test_a_base_whose_weights_are_elsewhere_is_scored_and_generates(
    how: str, tmp_path: Path
) -> None:
    scorer = made(tiny_llama(), rows=2, lora_rank=2)
    scores = scorer.score(PROMPTS).logits
    generated = scorer.generate(PROMPTS, max_new_tokens=3, do_sample=False)
    scorer.save_pretrained(tmp_path / "scorer")
    away = tiny_llama()
    if how == "to the disk":
        accelerate.disk_offload(away, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(away, execution_device=torch.device("cpu"))
    assert {p.device.type for p in away.parameters()} == {"meta"}
    attach(away, CPXConfig(rows=2, lora_rank=2)).detach()
    scorer = Complexity.from_pretrained(away, tmp_path / "scorer", insist=True)
    assert scorer.score(PROMPTS).logits == pytest.approx(scores, abs=1e-6)
    output = scorer.generate(PROMPTS, max_new_tokens=3, do_sample=False)
    for ours, theirs in zip(output.sequences, generated.sequences, strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)
    scorer.logits(torch.tensor(PROMPTS[:1])).sum().backward()
    assert scorer.rows.grad is not None and scorer.rows.device.type == "cpu"


# --- what cannot be -------------------------------------------------------------------------------


def test_settings_that_the_model_lacks_are_said(model: PreTrainedModel) -> None:
    with pytest.raises(InvalidInput, match="layer = 3: the model has 2 layers"):
        attach(model, CPXConfig(layer=3))
    with pytest.raises(InvalidInput, match="names no projection of the layers: there are"):
        attach(model, CPXConfig(lora_rank=1, lora_targets=("c_attn",)))
    assert attached(model) == {}


def test_a_prefill_of_another_depth_is_refused(model: PreTrainedModel) -> None:
    ran = prefill(model, torch.tensor(PROMPTS[:1]))
    with pytest.raises(InvalidInput, match=r"all layers, and this scorer reads after 1 layers"):
        made(model, layer=1).logits_of(ran)


# --- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", KINDS)
def test_saved_and_loaded_it_scores_the_same(
    model: PreTrainedModel, settings: dict[str, Any], tmp_path: Path
) -> None:
    scorer = made(model, **settings)
    before = scorer.score(PROMPTS).logits
    scorer.save_pretrained(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 30_000
    scorer.detach()
    loaded = Complexity.from_pretrained(model, tmp_path)
    assert loaded.config == scorer.config
    assert np.array_equal(loaded.score(PROMPTS).logits, before)


def test_loaded_on_another_base_it_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    made(model).save_pretrained(tmp_path)
    with pytest.raises(WrongBase):
        Complexity.from_pretrained(tiny_llama(seed=3), tmp_path)


def padded(prompts: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    batch = Batch.of(prompts)
    if side == "left":
        return batch.ids_BT, batch.mask_BT
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in prompts])
    return ids, mask


def as_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()
