"""Running the first k layers: nothing more is computed, nothing twice, and no bit differs."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma4TextConfig,
    HrmTextConfig,
    JambaConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ReformerConfig,
)

from pliant.anatomy.anatomy import Anatomy
from pliant.anatomy.depth import FirstLayers, run_first
from pliant.anatomy.several_depths import states_after
from pliant.anatomy.tiny import tiny_model
from pliant.errors import InvalidInput, UnsupportedModel

DEPTH = 4
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def build(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def llama(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return build(LlamaConfig(**SMALL), dtype)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return llama()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(1))


@contextmanager
def counting(model: nn.Module) -> Iterator[Counter[str]]:
    """How often each module computes (its hooks run) while the block runs."""
    counts: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda *_: counts.update([name])

    hooks = [m.register_forward_hook(count(name)) for name, m in model.named_modules()]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def cut_to(model: Any, k: int) -> Iterator[None]:
    """The same model without its later layers: what a truncated forward must agree with."""
    whole = model.model.layers
    model.model.layers = whole[:k]
    try:
        yield
    finally:
        model.model.layers = whole


def keys(cache: Any) -> list[Tensor]:
    return [layer.keys for layer in cache.layers]


class TestFirst:
    @pytest.mark.parametrize("k", range(1, DEPTH + 1))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_k_layers_equal_the_model_truncated_to_k_layers(
        self, k: int, dtype: torch.dtype, ids: Tensor
    ) -> None:
        model = llama(dtype)
        first = run_first(model, k, input_ids=ids)
        with cut_to(model, k):
            expected = model.model(ids).last_hidden_state
        assert torch.equal(first.normed, expected)

    def test_hidden_is_what_the_final_norm_receives(self, model: Any, ids: Tensor) -> None:
        states = model(ids, output_hidden_states=True).hidden_states
        for k in range(1, DEPTH):
            first = run_first(model, k, input_ids=ids)
            assert torch.equal(first.hidden, states[k])
            assert torch.equal(first.normed, model.model.norm(first.hidden))

    def test_neither_the_later_layers_nor_the_head_are_run(self, model: Any, ids: Tensor) -> None:
        with counting(model) as counts:
            run_first(model, 2, input_ids=ids)
        run = {name for name in counts if name.startswith("model.layers.")}
        assert {name.split(".")[2] for name in run} == {"0", "1"}
        assert "lm_head" not in counts

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_is_the_models_own(self, model: Any, ids: Tensor, side: str) -> None:
        mask = torch.ones_like(ids)
        mask[0, slice(0, 4) if side == "left" else slice(6, None)] = 0
        first = run_first(model, DEPTH, input_ids=ids, attention_mask=mask)
        assert torch.equal(first.normed, model.model(ids, attention_mask=mask).last_hidden_state)

    def test_the_prompt_can_be_run_in_two_pieces(self, model: Any, ids: Tensor) -> None:
        whole = run_first(model, 2, input_ids=ids)
        prompt = run_first(model, 2, input_ids=ids[:, :7], use_cache=True)
        for _ in range(2):
            piece = run_first(model, 2, input_ids=ids[:, 7:], past_key_values=prompt.cache)
            torch.testing.assert_close(piece.normed, whole.normed[:, 7:])

    def test_gradients_equal_those_of_the_truncated_model(self, ids: Tensor) -> None:
        model = llama()
        run_first(model, 2, resumable=False, input_ids=ids).normed.square().mean().backward()
        got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        with cut_to(model, 2):
            model.model(ids).last_hidden_state.square().mean().backward()
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


class TestResume:
    @pytest.mark.parametrize("k", range(1, DEPTH + 1))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("rows", [1, 2], ids=["one row", "a batch"])
    def test_the_output_is_the_models_own(
        self, k: int, dtype: torch.dtype, rows: int, ids: Tensor
    ) -> None:
        model = llama(dtype)
        ids = ids[:rows]
        inputs = {"input_ids": ids, "labels": ids, "use_cache": True, "output_hidden_states": True}
        expected = model(**inputs)
        output = run_first(model, k, **inputs).resume()
        assert type(output) is type(expected)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.loss, expected.loss)
        assert all(map(torch.equal, output.hidden_states, expected.hidden_states))
        assert all(map(torch.equal, keys(output.past_key_values), keys(expected.past_key_values)))

    def test_the_first_layers_are_not_run_again(self, model: Any, ids: Tensor) -> None:
        first = run_first(model, 2, input_ids=ids)
        with counting(model) as counts:
            first.resume()
        ran = {layer: counts[f"model.layers.{layer}.mlp"] for layer in range(DEPTH)}
        assert ran == {0: 0, 1: 0, 2: 1, 3: 1}
        assert counts["lm_head"] == 1

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_survives(self, model: Any, ids: Tensor, side: str) -> None:
        mask = torch.ones_like(ids)
        mask[0, slice(0, 4) if side == "left" else slice(6, None)] = 0
        output = run_first(model, 2, input_ids=ids, attention_mask=mask).resume()
        assert torch.equal(output.logits, model(ids, attention_mask=mask).logits)

    def test_it_can_be_repeated_with_independent_caches(self, model: Any, ids: Tensor) -> None:
        first = run_first(model, 2, input_ids=ids, use_cache=True)
        one, other = first.resume(), first.resume()
        model(ids[:, :1], past_key_values=one.past_key_values)
        assert one.past_key_values.get_seq_length() == 11
        assert other.past_key_values.get_seq_length() == 10
        assert first.cache.get_seq_length() == 10
        assert torch.equal(first.resume().logits, other.logits)

    def test_generation_continues_as_from_the_start(self, model: Any, ids: Tensor) -> None:
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        expected = model.generate(ids, **settings)
        output = run_first(model, 2, input_ids=ids, use_cache=True).resume()
        start = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
        settings["max_new_tokens"] = 7
        got = model.generate(start, past_key_values=output.past_key_values, **settings)
        assert torch.equal(got, expected)

    def test_a_cached_prefix_is_read_and_never_written(self, model: Any, ids: Tensor) -> None:
        prefix, rest = ids[:, :6], ids[:, 6:]
        cache = model(prefix, use_cache=True).past_key_values
        before = [k.clone() for k in keys(cache)]
        first = run_first(model, 2, input_ids=rest, past_key_values=cache)
        output = first.resume()
        assert cache.get_seq_length() == 6
        assert all(map(torch.equal, keys(cache), before))
        expected = model(rest, past_key_values=cache)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(first.resume().logits, expected.logits), "the caller's cache moved on"

    def test_the_backward_pass_goes_through_both_halves(self, ids: Tensor) -> None:
        model = llama()
        model(ids, labels=ids).loss.backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        run_first(model, 2, input_ids=ids, labels=ids).resume().loss.backward()
        assert all(map(torch.equal, [p.grad for p in model.parameters()], expected))

    def test_gradient_checkpointing_changes_nothing(self, ids: Tensor) -> None:
        model = llama().train()
        model(ids, labels=ids).loss.backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model.gradient_checkpointing_enable()
        run_first(model, 2, input_ids=ids, labels=ids).resume().loss.backward()
        assert all(map(torch.equal, [p.grad for p in model.parameters()], expected))

    def test_hooks_on_the_first_layers_have_the_same_effect(self, ids: Tensor) -> None:
        model = llama()
        model.model.layers[1].register_forward_hook(lambda _, __, output: output * 0.5)
        seen: list[Tensor] = []
        model.model.layers[0].register_forward_hook(lambda _, __, output: seen.append(output))
        expected = model(ids).logits
        assert torch.equal(run_first(model, 2, input_ids=ids).resume().logits, expected)
        assert len(seen) == 3, "in the whole run, the first layers and the resumed run"

    def test_a_model_that_was_compiled_in_place_stops_and_resumes(self, ids: Tensor) -> None:
        model = llama()
        expected = model(ids).logits
        torch._dynamo.reset()
        model.compile(backend="eager")
        for _ in range(2):
            assert torch.equal(model(ids).logits, expected)
            first = run_first(model, 2, input_ids=ids)
            assert torch.equal(first.normed, model.model.norm(first.hidden))
            with counting(model.model.layers) as counts:
                assert torch.equal(first.resume().logits, expected)
            assert counts["0.mlp"] == 0 and counts["2.mlp"] == 1


class TestOddModels:
    def test_shared_keys_and_values_outlive_the_stop(self, ids: Tensor) -> None:
        layers = ["sliding_attention", "full_attention"] * 2
        settings = {**SMALL, "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8}
        config = Gemma4TextConfig(
            **settings,
            vocab_size_per_layer_input=97,
            layer_types=layers,
            num_kv_shared_layers=2,
            per_layer_config=None,
        )
        model = build(config)
        expected = model(ids, use_cache=True)
        for k in range(1, DEPTH + 1):
            output = run_first(model, k, input_ids=ids, use_cache=True).resume()
            assert torch.equal(output.logits, expected.logits)
            again = model(ids[:, :1], past_key_values=output.past_key_values).logits
            cache = model(ids, use_cache=True).past_key_values
            assert torch.equal(again, model(ids[:, :1], past_key_values=cache).logits)

    def test_states_written_in_place_stay_as_they_were(self, ids: Tensor) -> None:
        config = JambaConfig(
            **SMALL,
            attn_layer_offset=1,
            attn_layer_period=2,
            num_experts=2,
            use_mamba_kernels=False,
        )
        model = build(config)
        cache = model(ids[:, :6], use_cache=True).past_key_values
        first = run_first(model, 3, input_ids=ids[:, 6:7], past_key_values=cache)
        outputs = [first.resume() for _ in range(2)]
        expected = model(ids[:, 6:7], past_key_values=cache)
        onward = model(ids[:, 7:8], past_key_values=expected.past_key_values).logits
        for output in outputs:
            assert torch.equal(output.logits, expected.logits)
            got = model(ids[:, 7:8], past_key_values=output.past_key_values).logits
            assert torch.equal(got, onward)

    def test_layers_that_are_run_in_cycles_are_refused(self, ids: Tensor) -> None:
        config = HrmTextConfig(**{**SMALL, "num_hidden_layers": 32}, num_layers_per_stack=2)
        with pytest.raises(UnsupportedModel, match="it runs layer 0 after layer"):
            run_first(build(config), 1, input_ids=ids)

    def test_reversible_layers_run_but_do_not_train(self, ids: Tensor) -> None:
        config = ReformerConfig(
            vocab_size=97,
            hidden_size=32,
            attention_head_size=8,
            num_attention_heads=4,
            feed_forward_size=48,
            attn_layers=["local"] * DEPTH,
            is_decoder=True,
            axial_pos_shape=[8, 16],
            axial_pos_embds_dim=[16, 16],
        )
        model = build(config)
        with torch.no_grad():
            output = run_first(model, 2, input_ids=ids).resume()
            assert torch.equal(output.logits, model(ids).logits)
        with pytest.raises(UnsupportedModel, match=r"reversible.* torch\.no_grad"):
            run_first(model, 2, input_ids=ids)


class TestThreads:
    def test_threads_on_one_model_do_not_disturb_each_other(self, model: Any, ids: Tensor) -> None:
        expected = model(ids).logits
        normed = {k: run_first(model, k, input_ids=ids).normed for k in range(1, DEPTH + 1)}
        wrong: list[str] = []

        def stop_and_resume(k: int) -> None:
            for _ in range(15):
                first = run_first(model, k, input_ids=ids)
                if not torch.equal(first.normed, normed[k]):
                    wrong.append(f"first {k}")
                if not torch.equal(first.resume().logits, expected):
                    wrong.append(f"resumed {k}")

        def run_whole() -> None:
            for _ in range(15):
                if not torch.equal(model(ids).logits, expected):
                    wrong.append("whole")

        threads = [threading.Thread(target=stop_and_resume, args=(k,)) for k in normed]
        threads += [threading.Thread(target=run_whole) for _ in range(2)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert wrong == []


class TestMistakes:
    @pytest.mark.parametrize("k", [0, -1, DEPTH + 1, 2.0])
    def test_an_invalid_depth_is_named(self, model: Any, ids: Tensor, k: Any) -> None:
        with pytest.raises(InvalidInput, match=f"k = {k!r} .* give 1 to {DEPTH}"):
            run_first(model, k, input_ids=ids)

    def test_a_run_that_is_not_resumable_raises(self, model: Any, ids: Tensor) -> None:
        first = run_first(model, 2, resumable=False, input_ids=ids)
        with pytest.raises(InvalidInput, match="resumable=False"):
            first.resume()

    def test_outputs_collected_inside_layers_are_refused(self, ids: Tensor) -> None:
        model = build(MixtralConfig(**SMALL, num_local_experts=2, output_router_logits=True))
        with pytest.raises(InvalidInput, match="output_router_logits"):
            run_first(model, 2, input_ids=ids)
        first = run_first(model, 2, input_ids=ids, output_router_logits=False)
        assert torch.equal(first.resume().logits, model(ids).logits)
        assert isinstance(run_first(model, 2, resumable=False, input_ids=ids), FirstLayers)

    def test_a_failing_run_leaves_the_model_as_it_was(self, model: Any, ids: Tensor) -> None:
        before = {name: dict(vars(m)) for name, m in model.named_modules()}
        with pytest.raises(IndexError):
            run_first(model, 2, input_ids=ids + 1000)
        run_first(Anatomy.of(model), 2, input_ids=ids).resume()
        assert {name: dict(vars(m)) for name, m in model.named_modules()} == before


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "opt", "mllama"])
def test_several_depths_give_the_states_of_each_alone(name: str) -> None:
    model = tiny_model(name)
    ids, depths = torch.arange(5, 20)[None], [1, len(Anatomy.of(model).layers)]
    with torch.no_grad():
        states = states_after(model, depths, input_ids=ids, use_cache=False)
        for k in depths:
            alone = run_first(model, k, resumable=False, input_ids=ids, use_cache=False)
            assert torch.equal(states[k], alone.normed)


def test_several_depths_run_every_layer_once(model: PreTrainedModel, ids: Tensor) -> None:
    ran: Counter[int] = Counter()
    layers = Anatomy.of(model).layers
    hooks = [
        layer.self_attn.register_forward_hook(lambda *_, i=i: ran.update([i]))
        for i, layer in enumerate(layers)
    ]
    with torch.no_grad():
        assert set(states_after(model, [1, 3], input_ids=ids)) == {1, 3}
    for hook in hooks:
        hook.remove()
    assert ran == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize("depths", [[], [0], [DEPTH + 1]])
def test_depths_that_the_model_does_not_have_are_refused(
    model: PreTrainedModel, ids: Tensor, depths: list[int]
) -> None:
    with pytest.raises(InvalidInput, match=f"from 1 to {DEPTH}"):
        states_after(model, depths, input_ids=ids)
