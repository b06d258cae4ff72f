"""On every architecture: stopping after k layers and resuming gives the model's own bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contracts.conftest import runnable
from tests.contracts.page import PAGE
from torch import Tensor

from pliant.anatomy import Anatomy, run_first
from pliant.anatomy.cache_copy import copy_state
from pliant.anatomy.depth import DepthProof, cache_name, prove_depth, same_bits
from pliant.anatomy.tiny import tiny_model

QUICK = [
    "llama",
    "gpt2",
    "qwen3_next",  # linear attention in most layers
    "gemma3n_text",  # four streams, shared keys and values
    "gemma4_text",
    "mixtral",
    "mamba",
    "rwkv",  # a state in a list, written in place
    "jamba",
    "deepseek_v3",
    "deepseek_v4",  # hyper-connections and a compressed cache
    "opt",
]

REFUSED = {
    "hrm_text": "it runs layer 0 after layer",
    "xlm": "no stack of layers",
}
"""The types that run and cannot be stopped, with what the error says of them."""


@pytest.fixture(params=QUICK)
def type_(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def anatomy(type_: str, request: pytest.FixtureRequest) -> Anatomy:
    return Anatomy.of(tiny_model(type_, dtype=request.param))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(5, 100, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_all_layers_are_the_model_and_half_of_them_can_be_resumed(
    anatomy: Anatomy, ids: Tensor
) -> None:
    assert prove_depth(anatomy, ids) == DepthProof(first_layers=None, resume=None)


@torch.no_grad()
def test_every_depth_resumes_under_left_padding(anatomy: Anatomy, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
    whole = anatomy.model(**inputs)
    for k in range(1, len(anatomy.layers) + 1):
        assert same_bits(run_first(anatomy, k, **inputs).resume().logits, whole.logits), k


@torch.no_grad()
def test_a_cached_prefix_is_resumed_and_stays_as_it_was(anatomy: Anatomy, ids: Tensor) -> None:
    prefix = anatomy.model(input_ids=ids[:, :7], use_cache=True)
    name = cache_name(prefix)
    assert name is not None
    cache = getattr(prefix, name)
    first = run_first(anatomy, 2, input_ids=ids[:, 7:8], use_cache=True, **{name: cache})
    outputs = [first.resume() for _ in range(2)]
    whole = anatomy.model(input_ids=ids[:, 7:8], use_cache=True, **{name: copy_state(cache)})
    for output in outputs:
        assert same_bits(output.logits, whole.logits)
        assert same_bits(_onward(anatomy, output, name), _onward(anatomy, whole, name))


def test_the_gradient_reaches_the_first_layers_alone(anatomy: Anatomy, ids: Tensor) -> None:
    first = run_first(anatomy, 2, resumable=False, input_ids=ids, use_cache=False)
    first.normed.float().square().mean().backward()
    reached = [any(p.grad is not None for p in layer.parameters()) for layer in anatomy.layers]
    assert reached == [True, True] + [False] * (len(anatomy.layers) - 2)


@pytest.mark.parametrize("column", ["first k", "resume"])
def test_at_least_160_types_stop_and_resume_exactly(column: str) -> None:
    """test_page.py measures every type again."""
    assert PAGE.count(column) >= 160
    at = PAGE.columns.index(column)
    refused = {name: PAGE.notes[name][at] for name in runnable() if not PAGE.says(name, column)}
    assert refused.keys() <= REFUSED.keys()
    for name, note in refused.items():
        assert note is not None and REFUSED[name] in PAGE.reasons[note]


def _onward(anatomy: Anatomy, output: Any, name: str) -> Tensor:
    token = output.logits[:, -1:].argmax(dim=-1)
    cache = copy_state(getattr(output, name))
    return anatomy.model(input_ids=token, use_cache=True, **{name: cache}).logits
