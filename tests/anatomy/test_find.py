"""Anatomy finds parts by structure, inside any wrapper, unless they are named."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from pliant import adapters
from pliant.adapters.fingerprint import fingerprint
from pliant.anatomy import Anatomy
from pliant.anatomy.blocks import as_projection
from pliant.anatomy.find import unwrap
from pliant.anatomy.tiny import tiny_model
from pliant.errors import UnsupportedModel


def test_a_llama_is_described() -> None:
    model = tiny_model("mistral")
    anatomy = Anatomy.of(model)
    assert anatomy.decoder is model.model
    assert list(anatomy.layers) == list(model.model.layers)
    assert anatomy.embeddings is model.model.embed_tokens
    assert anatomy.norm is model.model.norm
    assert anatomy.head is model.lm_head
    assert anatomy.hidden_size == 64
    attention, mlp = anatomy.attention(0), anatomy.mlp(0)
    assert attention is not None and mlp is not None
    assert attention.output is model.model.layers[0].self_attn.o_proj
    assert (attention.output_name, attention.axis) == ("self_attn.o_proj", 1)
    assert (attention.heads, attention.head_dim, attention.kv_heads) == (4, 16, 1)
    assert mlp.down is model.model.layers[0].mlp.down_proj
    assert (mlp.down_name, mlp.width, mlp.axis) == ("mlp.down_proj", 128, 1)


def test_the_heads_of_a_conv1d_lie_on_axis_0() -> None:
    attention = Anatomy.of(tiny_model("gpt2")).attention(0)
    assert attention is not None and attention.axis == 0
    assert attention.output.weight.shape[0] == attention.heads * attention.head_dim


def test_heads_that_are_subtracted_in_pairs_leave_as_one() -> None:
    attention = Anatomy.of(tiny_model("diffllama")).attention(0)
    assert attention is not None and (attention.heads, attention.head_dim) == (2, 32)


def test_an_output_of_unknown_name_is_recognized_by_its_shape() -> None:
    model = tiny_model("mistral")
    for layer in model.model.layers:
        layer.self_attn.leave = layer.self_attn.o_proj
        del layer.self_attn.o_proj
    attention = Anatomy.of(model).attention(0)
    assert attention is not None and attention.output_name == "self_attn.leave"


def test_of_two_that_fit_by_shape_none_is_guessed() -> None:
    model = tiny_model("mistral")
    for layer in model.model.layers:
        layer.self_attn.leave = layer.self_attn.o_proj
        layer.self_attn.stay = nn.Linear(64, 64)
        del layer.self_attn.o_proj
    anatomy = Anatomy.of(model)
    assert anatomy.attention(0) is None
    assert "no projection takes all its heads" in (anatomy.why_no_attention(0) or "")


def test_a_hybrid_has_attention_in_some_layers_and_says_why_not_in_others() -> None:
    anatomy = Anatomy.of(tiny_model("jamba"))
    has_attention = [anatomy.attention(i) is not None for i in range(4)]
    assert has_attention == [False, True, False, True]
    assert "no softmax attention" in (anatomy.why_no_attention(0) or "")
    assert anatomy.why_no_attention(1) is None


def test_a_mixture_of_experts_has_no_single_down_projection() -> None:
    anatomy = Anatomy.of(tiny_model("mixtral"))
    assert anatomy.mlp(0) is None
    assert "mixture of experts" in (anatomy.why_no_mlp(0) or "")


def test_heads_may_differ_between_layers() -> None:
    anatomy = Anatomy.of(tiny_model("gemma4_text"))
    widths = [a.head_dim for i in range(4) if (a := anatomy.attention(i)) is not None]
    assert len(set(widths)) == 2


def test_a_layer_with_two_attentions_gives_both() -> None:
    anatomy = Anatomy.of(tiny_model("longcat_flash"))
    assert len(anatomy.attentions(0)) == len(anatomy.mlps(0)) == 2
    assert anatomy.attention(0) == anatomy.attentions(0)[0]


def test_a_composite_model_is_described_by_its_text_decoder() -> None:
    model = tiny_model("gemma3")
    anatomy = Anatomy.of(model)
    assert anatomy.decoder is model.model.language_model
    assert list(anatomy.layers) == list(model.model.language_model.layers)


def test_a_model_without_weights_is_described() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3))
    anatomy = Anatomy.of(model)
    attention = anatomy.attention(2)
    assert attention is not None and (attention.heads, attention.head_dim) == (32, 128)


# --- wrapped ---


def test_a_peft_model_is_unwrapped_and_its_lora_layer_is_the_output() -> None:
    from peft import LoraConfig, get_peft_model

    plain = tiny_model("llama")
    wrapped = get_peft_model(plain, LoraConfig(target_modules=["o_proj", "down_proj"]))
    anatomy = Anatomy.of(wrapped)
    attention, mlp = anatomy.attention(0), anatomy.mlp(0)
    assert attention is not None and mlp is not None
    assert attention.output is anatomy.layers[0].self_attn.o_proj
    assert hasattr(attention.output, "lora_A") and hasattr(mlp.down, "lora_A")
    assert attention.heads == 4


def test_a_lora_on_a_conv1d_keeps_its_axis() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["c_proj"], fan_in_fan_out=True)
    attention = Anatomy.of(get_peft_model(tiny_model("gpt2"), config)).attention(0)
    assert attention is not None and (attention.axis, attention.heads) == (0, 4)


def test_a_packed_weight_does_not_hide_the_sizes() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj = Packed(layer.self_attn.o_proj)
    attention = Anatomy.of(model).attention(0)
    assert attention is not None and attention.heads * attention.head_dim == 64


class Packed(nn.Linear):
    """A 4-bit linear as bitsandbytes keeps it: one column of bytes."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        numbers = plain.weight.numel() // 2
        self.weight = nn.Parameter(torch.zeros(numbers, 1, dtype=torch.uint8), requires_grad=False)


# --- by hand ---


class Strange(nn.Module):
    """A model of nobody's family: no config, no getters, no name that is known."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.core = nn.Module()
        self.core.steps = nn.Sequential(*(StrangeStep(width) for _ in range(depth)))
        self.readout = nn.Linear(width, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.readout(self.core.steps(self.table(ids)))


class StrangeStep(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.ModuleDict(
            {"into": nn.Linear(width, 3 * width), "out": nn.Linear(width, width)}
        )
        self.feed = nn.ModuleDict({"up": nn.Linear(width, 24), "narrow": nn.Linear(24, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix["out"](self.mix["into"](x).chunk(3, -1)[0])
        return x + self.feed["narrow"](self.feed["up"](x))


def test_an_unknown_model_is_refused_with_what_was_looked_for_and_the_way_out() -> None:
    with pytest.raises(UnsupportedModel, match=r"ModuleList.*Anatomy\.of\(model, layers="):
        Anatomy.of(Strange())


def test_every_part_can_be_named_by_hand() -> None:
    model = Strange()
    anatomy = Anatomy.of(
        model,
        layers="core.steps",
        attention_output="mix.out",
        mlp_down="narrow",
        head="readout",
        heads=2,
    )
    attention, mlp = anatomy.attention(1), anatomy.mlp(1)
    assert attention is not None and mlp is not None
    assert attention.output is model.core.steps[1].mix["out"]
    assert (attention.heads, attention.head_dim) == (2, 4)
    assert mlp.down is model.core.steps[1].feed["narrow"] and mlp.width == 24
    assert anatomy.embeddings is model.table and anatomy.head is model.readout
    assert anatomy.hidden_size == 8 and len(anatomy.layers) == 2


def test_a_name_that_fits_nothing_says_so() -> None:
    with pytest.raises(UnsupportedModel, match="layers='core.stairs'.*table, core, readout"):
        Anatomy.of(Strange(), layers="core.stairs")
    with pytest.raises(UnsupportedModel, match="attention_output='nose'"):
        Anatomy.of(Strange(), layers="core.steps", attention_output="nose")
    with pytest.raises(UnsupportedModel, match="without children"):
        Anatomy.of(Strange(), layers="readout")


def test_heads_that_do_not_fit_are_no_attention() -> None:
    with pytest.raises(UnsupportedModel, match="8 inputs"):
        Anatomy.of(Strange(), layers="core.steps", attention_output="mix.out", heads=3)


def test_naming_the_right_parts_changes_nothing() -> None:
    model = tiny_model("llama")
    unnamed = Anatomy.of(model)
    named = Anatomy.of(
        model, layers="model.layers", attention_output="o_proj", mlp_down="mlp.down_proj"
    )
    assert [named.attention(i) for i in range(4)] == [unnamed.attention(i) for i in range(4)]
    assert [named.mlp(i) for i in range(4)] == [unnamed.mlp(i) for i in range(4)]


@pytest.mark.parametrize("module", [nn.Embedding(3, 4), nn.LayerNorm(4), SimpleNamespace()])
def test_what_maps_no_features_is_no_projection(module: Any) -> None:
    assert as_projection(module) is None


# --- wrappers -------------------------------------------------------------------------------------


class Engine(nn.Module):
    """Holds a model as DeepSpeed's engine does: as its only module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.steps = 0


def lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": torch.compile,
    "data_parallel": nn.DataParallel,
    "ddp": nn.parallel.DistributedDataParallel,
    "engine": Engine,
    "peft": lora,
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("names", list(itertools.permutations(WRAPPERS, 2)), ids="-".join)
def test_wrappers_in_any_order(names: tuple[str, ...]) -> None:
    model = wrapped = tiny_model("llama")
    for name in names:
        wrapped = WRAPPERS[name](wrapped)
    assert unwrap(wrapped) is model
    assert Anatomy.of(wrapped).model is model
    assert fingerprint(wrapped) == fingerprint(model)


def test_all_of_them_at_once() -> None:
    model = tiny_model("llama")
    wrapped = Engine(nn.parallel.DistributedDataParallel(torch.compile(lora(model))))
    assert unwrap(wrapped) is model
    assert adapters.attached(wrapped) == {}


def test_fsdp_version_1() -> None:
    model = tiny_model("llama")
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    assert unwrap(wrapped) is model
    assert unwrap(torch.compile(wrapped)) is model


def test_fsdp_version_2_wraps_nothing() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_model("llama")
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert unwrap(model) is model


def test_a_prompt_tuned_model() -> None:
    model = tiny_model("llama")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert unwrap(get_peft_model(model, config)) is model


def test_a_model_without_wrappers() -> None:
    model = tiny_model("gpt2")
    assert unwrap(model) is model
    assert unwrap(nn.Sequential(nn.Linear(2, 2))) is not None
