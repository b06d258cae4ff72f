"""A tiny model is small, the same for the same seed, and of its config's structure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tests.contracts.page import PAGE
from transformers import (
    Gemma3nTextConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
)

from pliant.anatomy.tiny import (
    OVERRIDES,
    causal_lm_types,
    default_config,
    merged,
    shrink,
    tiny_config,
    tiny_model,
    variants,
)

LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
    eos_token_id=128009,
)


def test_one_seed_gives_one_model_and_another_seed_another() -> None:
    one, same, other = (tiny_model("llama", seed=seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_the_global_random_state_stays_the_same() -> None:
    before = torch.get_rng_state()
    tiny_model("llama")
    assert torch.equal(before, torch.get_rng_state())


def test_no_parameter_is_a_constant() -> None:
    for name, parameter in tiny_model("gpt2").named_parameters():
        assert parameter.unique().numel() > 1, name


def test_it_has_the_requested_dtype_and_is_in_eval_mode() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training


def test_a_large_config_becomes_tiny_and_is_itself_unchanged() -> None:
    before = LLAMA_70B.to_dict()
    model = tiny_model(LLAMA_70B)
    assert sum(p.numel() for p in model.parameters()) < 500_000
    assert LLAMA_70B.to_dict() == before


def test_special_tokens_stay_inside_the_vocabulary() -> None:
    tiny = tiny_config(LLAMA_70B)
    assert tiny.eos_token_id < tiny.vocab_size and tiny.bos_token_id == 1


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tiny_kv_heads"),
    [(32, 32, 4), (32, 16, 2), (64, 8, 1), (71, 1, 1), (12, 4, 2)],
)
def test_query_heads_share_key_heads_as_they_did(
    heads: int, kv_heads: int, tiny_kv_heads: int
) -> None:
    config = LlamaConfig(
        num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=64 * heads
    )
    assert tiny_config(config).num_key_value_heads == tiny_kv_heads


def test_three_heads_become_a_number_that_divides_the_hidden_size() -> None:
    """transformers refuses others, so every question about nano-s was answered with no."""
    three = LlamaConfig(hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    tiny = tiny_config(three)
    assert tiny.hidden_size % tiny.num_attention_heads == 0
    assert tiny.num_key_value_heads == tiny.num_attention_heads
    assert tiny_model(three)(torch.tensor([[5, 6]])).logits.isfinite().all()


def test_tied_embeddings_stay_tied_and_untied_ones_apart() -> None:
    for tied in (True, False):
        model = tiny_model(LlamaConfig(tie_word_embeddings=tied))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_each_kind_of_layer_stays() -> None:
    tiny = tiny_config(Qwen3NextConfig())
    assert set(tiny.layer_types) == {"linear_attention", "full_attention"}
    assert len(tiny.layer_types) == tiny.num_hidden_layers == 4


def test_a_mixture_stays_a_mixture_of_few() -> None:
    tiny = tiny_config(MixtralConfig())
    assert (tiny.num_local_experts, tiny.num_experts_per_tok) == (4, 2)


def test_layers_that_share_keys_go_on_sharing_them() -> None:
    tiny = tiny_config(Gemma3nTextConfig())
    assert tiny.num_kv_shared_layers == 2
    assert set(tiny.layer_types[:2]) == set(tiny.layer_types[2:])


def test_a_quantised_config_gives_a_plain_tiny_model() -> None:
    config = LlamaConfig()
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert not hasattr(tiny_model(config).config, "quantization_config")


@pytest.mark.skipif(
    transformers.__version__ < PAGE.transformers_version, reason="older, and knows fewer types"
)
def test_overrides_name_types_that_exist() -> None:
    types = set(causal_lm_types())
    named = {
        name.partition("+")[0] for section in ("arguments", "sizes") for name in OVERRIDES[section]
    }
    assert named | {name.partition("+")[0] for name in variants()} <= types


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3", "qwen3_5_moe", "gemma4_text"])
def test_shrinking_the_tiny_changes_nothing_more(name: str) -> None:
    once = shrink(default_config(name).to_dict())
    assert shrink(once) == once


sections = st.recursive(
    st.integers(),
    lambda inner: st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)
configs = st.dictionaries(st.text(max_size=2), sections, max_size=4)


@given(configs)
def test_merging_nothing_changes_nothing(config: dict[str, Any]) -> None:
    assert merged(config, {}) == config == merged({}, config) == merged(config, config)


@given(configs, configs)
def test_merged_changes_win(config: dict[str, Any], changes: dict[str, Any]) -> None:
    result = merged(config, changes)
    assert set(result) == {*config, *changes}
    assert all(
        result[key] == value for key, value in changes.items() if not isinstance(value, dict)
    )


def test_a_custom_config_type_shrinks_too() -> None:
    class Own(PreTrainedConfig):
        model_type = "one-of-ones-own"

        def __init__(self, hidden_size: int = 4096, n_layer: int = 24, **rest: Any) -> None:
            self.hidden_size, self.n_layer = hidden_size, n_layer
            super().__init__(**rest)

    tiny = tiny_config(Own())
    assert (tiny.hidden_size, tiny.n_layer) == (64, 4)
