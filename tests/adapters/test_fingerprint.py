"""A fingerprint identifies its base in every format, and no other model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.minimal_adapter import Scale, ScaleConfig, Warmup, WarmupConfig, tiny_llama
from torch import nn

from pliant.adapters import Fingerprint, attach, fingerprint
from pliant.adapters.fingerprint import QUANTISED, _bits, _same
from pliant.loading import load_model


def trained_llama(seed: int = 0) -> nn.Module:
    """Random biases and norms as well, since initial ones are all zero or one."""
    model = tiny_llama(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model


def cast(model: nn.Module, *dtypes: torch.dtype) -> nn.Module:
    for dtype in dtypes:
        model = model.to(dtype)
    return model


FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.mark.parametrize(
    "path",
    [
        (BF16,),
        (BF16, FP32),
        (FP64,),
        (FP16,),
        (FP16, FP32),
        (BF16, FP16),
        (FP64, BF16),
    ],
    ids=lambda path: "-".join(str(d).removeprefix("torch.") for d in path),
)
def test_a_copy_in_another_dtype_is_the_same_base(path: tuple[torch.dtype, ...]) -> None:
    there, here = fingerprint(trained_llama()), fingerprint(cast(trained_llama(), *path))
    assert there.level == here.level == "values"
    assert not there.differences(here) and not here.differences(there)


def test_one_stored_fp16_file_is_one_base_in_whatever_dtype_it_is_loaded() -> None:
    stored = trained_llama().half().state_dict()
    prints = []
    for dtype in (FP16, FP32, BF16):
        model = tiny_llama().to(dtype)
        model.load_state_dict(stored)
        prints.append(fingerprint(model))
    assert all(agree(a, b) for a in prints for b in prints)


def test_fp16_storage_is_recognised_by_its_values_whatever_the_dtype() -> None:
    assert fingerprint(cast(trained_llama(), FP16, FP32)).grid == "fp16"
    assert fingerprint(cast(trained_llama(), BF16, FP32)).grid == "bf16"
    assert fingerprint(trained_llama()).grid == "fp32"


@given(st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=64))
def test_one_step_of_rounding_is_allowed_and_no_more(numbers: list[float]) -> None:
    values = torch.tensor(numbers)
    assert _same(_bits(values), _bits(values.half().float()), allow_step=True)
    larger = values * 1.02 + torch.where(values < 0, -1e-6, 1e-6)  # away from 0
    assert not _same(_bits(values), _bits(larger), allow_step=True)


def test_bf16_and_fp32_are_equal_without_it() -> None:
    one_step = torch.tensor([1.0]), torch.tensor([1.0078125])
    assert not _same(_bits(one_step[0]), _bits(one_step[1]), allow_step=False)


def test_another_seed_is_another_base() -> None:
    differences = fingerprint(trained_llama(0)).differences(fingerprint(trained_llama(1)))
    assert "the values of" in differences and "sampled tensors" in differences


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_a_little_training_makes_another_base(dtype: torch.dtype) -> None:
    model = cast(trained_llama(), dtype)
    before = fingerprint(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    assert "values" in before.differences(fingerprint(model))


def test_one_changed_matrix_is_named() -> None:
    model = trained_llama()
    before = fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    assert "model.layers.1.mlp.up_proj.weight differ" in before.differences(fingerprint(model))


def test_another_depth_and_another_vocabulary_are_named() -> None:
    there = fingerprint(tiny_llama())
    deeper = there.differences(fingerprint(tiny_llama(num_hidden_layers=3)))
    assert "layers.*.input_layernorm.weight is [16] x3 here and [16] x2 there" in deeper
    resized = there.differences(fingerprint(tiny_llama(vocab_size=72)))
    assert "model.embed_tokens.weight is [72, 16] here and [64, 16] there" in resized


def test_adapters_do_not_change_it() -> None:
    model = trained_llama()
    before = fingerprint(model)
    attach(model, Scale(model, ScaleConfig()))
    attach(model, Warmup(model, WarmupConfig()))
    assert fingerprint(model) == before


def test_wrappers_do_not_change_it() -> None:
    import peft

    model = trained_llama()
    before = fingerprint(model)
    assert fingerprint(nn.DataParallel(model)) == before
    assert fingerprint(torch.compile(model)) == before
    for more in ({}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}):
        config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, **more)
        wrapped = peft.get_peft_model(model, config)
        assert fingerprint(wrapped) == before, more
        model = wrapped.unload()


def with_peft(seed: int, name: str = "default", part: str = "", **settings: Any) -> Any:
    """A model of `trained_llama` with a PEFT adapter of which `part` was trained."""
    import peft

    config = peft.LoraConfig(**{"target_modules": ["q_proj", "down_proj"], "r": 2, **settings})
    wrapped = peft.get_peft_model(trained_llama(), config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in wrapped.named_parameters():
            if parameter.requires_grad and part in path:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return wrapped


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"target_modules": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"], "part": "modules_to_save"},
        {"trainable_token_indices": [1, 2], "part": "trainable_tokens"},
    ],
    ids=str,
)
def test_an_active_peft_adapter_is_part_of_the_base(settings: dict[str, Any]) -> None:
    plain, wrapped = fingerprint(trained_llama()), with_peft(1, **settings)
    there = fingerprint(wrapped)
    assert "'default' here and none there" in plain.differences(there)
    assert "none here and 'default' there" in there.differences(plain)
    assert not agree(there, fingerprint(with_peft(2, **settings)))
    renamed = fingerprint(with_peft(1, "other", **settings))
    assert agree(there, renamed) and list(renamed.adapters or ()) == ["other"]
    assert agree(there, fingerprint(wrapped.to(BF16)))
    with wrapped.disable_adapter():
        assert agree(plain, fingerprint(wrapped))


def test_a_peft_adapter_of_another_scale_is_another() -> None:
    assert not agree(fingerprint(with_peft(1)), fingerprint(with_peft(1, lora_alpha=32)))


def test_what_older_files_do_not_say_of_peft_is_not_compared() -> None:
    old = replace(fingerprint(trained_llama()), adapters=None)
    assert agree(old, fingerprint(with_peft(1))) and agree(old, fingerprint(trained_llama()))


def test_tied_or_copied_is_the_same_base() -> None:
    tied = tiny_llama(tie_word_embeddings=True)
    copied = tiny_llama(tie_word_embeddings=False)
    copied.load_state_dict(tied.state_dict())
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert copied.lm_head.weight is not copied.model.embed_tokens.weight
    assert not fingerprint(tied).differences(fingerprint(copied))


def test_it_is_small_for_a_large_model() -> None:
    with torch.device("meta"):
        model = tiny_llama(num_hidden_layers=80)
    assert len(str(fingerprint(model))) < 2000
    model = tiny_llama(num_hidden_layers=40)
    assert len(fingerprint(model).samples) == 64


# --- where values cannot be had ------------------------------------------------------------------


class Int8(nn.Module):
    """A linear layer as quantisers leave it: sizes, packed weights, scales."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        packed = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed.flatten(), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.view(self.out_features, -1) * self.scale).T.to(x.dtype)


def quantised(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        for name in ("up_proj", "down_proj", "gate_proj"):
            setattr(layer.mlp, name, Int8(getattr(layer.mlp, name)))
    return model


def agree(a: Fingerprint, b: Fingerprint) -> bool:
    return not a.differences(b) and not b.differences(a)


def test_a_quantised_base_is_known_by_names_and_shapes() -> None:
    whole, small = fingerprint(tiny_llama()), fingerprint(quantised(tiny_llama()))
    assert (small.level, small.why, small.samples) == ("shapes", QUANTISED, {})
    assert agree(whole, small) and agree(small, fingerprint(quantised(tiny_llama(1))))
    assert not agree(small, fingerprint(tiny_llama(hidden_size=32)))
    assert not agree(small, fingerprint(tiny_llama(num_hidden_layers=1)))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_torchs_own_quantised_layers_count_as_such() -> None:
    whole = fingerprint(tiny_llama())
    dynamic = torch.ao.quantization.quantize_dynamic(tiny_llama(), {nn.Linear})
    assert fingerprint(dynamic).why == QUANTISED
    assert agree(whole, fingerprint(dynamic))


def test_without_weights_it_is_known_by_names_and_shapes() -> None:
    with torch.device("meta"):
        empty = tiny_llama()
    assert fingerprint(empty).level == "shapes"
    assert "no weights at hand" in fingerprint(empty).why
    assert agree(fingerprint(tiny_llama()), fingerprint(empty))


def test_a_partly_offloaded_base_is_compared_where_it_can_be() -> None:
    model = trained_llama()
    model.model.layers[0].to("meta")
    offloaded = fingerprint(model)
    assert offloaded.level == "values" and len(offloaded.samples) < len(
        fingerprint(tiny_llama()).samples
    )
    assert agree(fingerprint(trained_llama()), offloaded)
    assert not agree(fingerprint(trained_llama(1)), offloaded)


def test_a_folder_of_fp16_weights_that_loads_as_fp32_is_the_same_base(tmp_path: Path) -> None:
    model = trained_llama()
    before = fingerprint(model)
    model.half().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=FP32)
    assert again.dtype == FP32
    assert agree(before, fingerprint(again))


def test_an_embedded_base_has_its_name_in_any_folder() -> None:
    assert fingerprint(load_model("nano-s")).name == "nano-s"
