"""The anatomy of a model agrees with what happens when it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pliant.anatomy import Anatomy
from pliant.anatomy.blocks import as_projection
from pliant.errors import UnsupportedModel
from pliant.survey import Specimen


def anatomy_of(specimen: Specimen) -> Anatomy:
    try:
        return specimen.anatomy
    except UnsupportedModel as unsupported:
        pytest.skip(str(unsupported))


def test_the_input_of_an_output_projection_is_all_heads_side_by_side(every: Specimen) -> None:
    anatomy = anatomy_of(every)
    for index in range(len(anatomy.layers)):
        for block in anatomy.attentions(index):
            projection = as_projection(block.output)
            assert projection is not None and projection.inputs == block.heads * block.head_dim
            assert block.output.weight.shape[block.axis] == projection.inputs
            assert anatomy.layers[index].get_submodule(block.output_name) is block.output
            assert block.heads % block.kv_heads == 0


def test_the_attention_function_gets_as_many_heads_as_in_the_anatomy(every: Specimen) -> None:
    anatomy = anatomy_of(every)
    blocks = [a for i in range(len(anatomy.layers)) for a in anatomy.attentions(i)]
    with watched_attention(anatomy) as seen:
        every.run()
    if not blocks or not seen:
        pytest.skip("it has no attention, or never calls the attention interface")
    halves = every.of == "diffllama"  # which subtracts its heads in pairs after the interface
    for heads, kv_heads, width in seen:
        if halves:
            heads, kv_heads, width = heads // 2, kv_heads // 2, 2 * width
        assert (heads, width) in {(a.heads, a.head_dim) for a in blocks}
        # Multi-query and latent attention may hand over one key head, or all of them expanded.
        expanded = {a.heads for a in blocks if a.kv_heads == 1}
        assert kv_heads in {a.kv_heads for a in blocks} | {1} | expanded


def test_inputs_and_outputs_of_layers_have_the_hidden_size(every: Specimen) -> None:
    anatomy = anatomy_of(every)
    widths: set[int] = set()

    def record(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        widths.update(
            (given.shape[-1], (output if isinstance(output, Tensor) else output[0]).shape[-1])
        )

    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in anatomy.layers]
    every.run()
    for hook in hooks:
        hook.remove()
    # Qwen4-Exp carries several streams side by side.
    assert all(width % anatomy.hidden_size == 0 for width in widths)


def test_the_norm_runs_last_of_all_before_the_head(every: Specimen) -> None:
    anatomy = anatomy_of(every)
    if anatomy.norm is None or anatomy.head is None:
        pytest.skip("it does not end in a norm, or has no head")
    order: list[str] = []
    watched = [("layer", anatomy.layers[-1]), ("norm", anatomy.norm), ("head", anatomy.head)]
    hooks = [m.register_forward_hook(lambda *_, n=name: order.append(n)) for name, m in watched]
    every.run()
    for hook in hooks:
        hook.remove()
    last_layer = len(order) - 1 - order[::-1].index("layer") if "layer" in order else -1
    assert order[last_layer + 1 :][-2:] == ["norm", "head"]


def test_anatomy_changes_nothing(quick: Specimen) -> None:
    before = {name: value.clone() for name, value in quick.model.state_dict().items()}
    anatomy = Anatomy.of(quick.model)
    for index in range(len(anatomy.layers)):
        anatomy.attentions(index), anatomy.mlps(index)
    after = quick.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in quick.model.modules())


@contextmanager
def watched_attention(anatomy: Anatomy) -> Iterator[list[tuple[int, int, int]]]:
    """Heads, key heads and value width of every call that the layers make of the interface."""
    seen: list[tuple[int, int, int]] = []
    inside = {id(module) for layer in anatomy.layers for module in layer.modules()}
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watching(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any
    ) -> Any:
        output = plain(module, query, key, value, *args, **kw)
        if id(module) in inside:
            seen.append((query.shape[1], key.shape[1], output[0].shape[-1]))
        return output

    AttentionInterface.register("sdpa", watching)
    try:
        yield seen
    finally:
        AttentionInterface.register("sdpa", plain)
