"""Growth keeps the function and leaves nothing a twin."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pliant.nano.train.__main__ import _spread, deepen, widen


@pytest.fixture
def small() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).double()
    for p in model.parameters():  # norms too: a fresh model's are all 1 and hide mistakes
        torch.nn.init.normal_(p, std=0.3)
    return model


IDS = torch.arange(24).reshape(2, 12)


def test_a_wider_model_is_the_same_function(small):
    wide = widen(small).double()
    # Growth copies in fp32, so the bound is fp32's.
    torch.testing.assert_close(wide(IDS).logits, small(IDS).logits, rtol=1e-4, atol=1e-4)
    assert wide.config.hidden_size == 64 and wide.config.num_attention_heads == 4
    assert wide.num_parameters() > 3 * small.num_parameters()


def test_a_deeper_model_is_the_same_function(small):
    small = small.float()
    deep = deepen(small, 3)
    torch.testing.assert_close(deep(IDS).logits, small(IDS).logits, rtol=0, atol=0)
    assert len(deep.model.layers) == deep.config.num_hidden_layers == 5


def test_the_halves_of_a_wider_model_part_when_it_learns(small):
    wide = widen(small).float()
    wide(IDS, labels=IDS).loss.backward()
    gradient = wide.model.layers[0].mlp.down_proj.weight.grad
    upper, lower = gradient.chunk(2, dim=0)
    assert (upper - lower).abs().max() > 1e-3 * gradient.abs().max()


def test_every_matrix_of_a_new_layer_but_the_last_can_learn(small):
    deep = deepen(small.float(), 1)
    new = next(layer for layer in deep.model.layers if layer.mlp.down_proj.weight.abs().max() == 0)
    deep(IDS, labels=IDS).loss.backward()
    assert new.mlp.down_proj.weight.grad.abs().max() > 0
    assert new.self_attn.o_proj.weight.grad.abs().max() > 0


def test_new_layers_are_spread_evenly_behind_old_ones():
    assert _spread(2, 2) == [0, None, 1, None]
    assert _spread(3, 1) == [0, 1, 2, None]
    assert _spread(4, 2) == [0, 1, None, 2, 3, None]
    assert _spread(3, 0) == [0, 1, 2]
