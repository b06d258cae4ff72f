"""On every architecture of the seed's page, and more: a truncated router is the first layers of the
model itself, with its own norm and head, and has nothing of its own."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tests.contracts.conftest import specimen
from torch import Tensor, nn

from pliant.anatomy.intercept import CALL
from pliant.anatomy.tiny import tiny_model
from pliant.errors import InvalidInput
from pliant.gradients.facade.scorer import RouterWarning, create_truncated_router
from pliant.survey import Specimen

PAGE = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "phi3",
    "gpt2",
    "gptj",
    "falcon",
    "bloom",
    "gpt_neox",
    "bert",
    "roberta",
    "mamba",
)
"""The types that the seed names, and BLOOM: it, Falcon and Mamba fail there."""


@pytest.fixture(params=PAGE)
def on_page(request: pytest.FixtureRequest) -> Specimen:
    return specimen(request.param)


@torch.no_grad()
def at_full_depth(case: Specimen) -> Tensor:
    router = create_truncated_router(case.model, num_layers=len(case.anatomy.layers))
    assert not router.passthrough
    return router(case.ids)


def test_at_full_depth_it_is_the_model(quick: Specimen) -> None:
    assert torch.equal(at_full_depth(quick), quick.logits)


def test_at_full_depth_it_is_the_model_of_the_page(on_page: Specimen) -> None:
    assert torch.equal(at_full_depth(on_page), on_page.logits)


@torch.no_grad()
def test_at_k_layers_it_is_the_model_without_the_others(on_page: Specimen) -> None:
    """Held against a copy of the model from which they were really taken out."""
    for k in range(1, len(on_page.anatomy.layers)):
        smaller = without_layers_after(on_page, k)
        found = create_truncated_router(on_page.model, num_layers=k)(on_page.ids)
        assert torch.equal(found, smaller(input_ids=on_page.ids, use_cache=False).logits), k
        assert not torch.equal(found, on_page.logits), "one layer less is another model"


@torch.no_grad()
def test_padding_is_the_models_own(on_page: Specimen) -> None:
    mask = torch.ones_like(on_page.ids)
    mask[0, :4] = 0
    smaller = without_layers_after(on_page, 1)
    router = create_truncated_router(on_page.model, num_layers=1)
    found = router(on_page.ids, attention_mask=mask)
    assert torch.equal(
        found, smaller(input_ids=on_page.ids, attention_mask=mask, use_cache=False).logits
    )


def test_it_leaves_the_model_alone_and_holds_nothing(on_page: Specimen) -> None:
    before = {name: p.clone() for name, p in on_page.model.state_dict().items()}
    router = create_truncated_router(on_page.model, num_layers=1)
    assert not router.state_dict() and not list(router.parameters())
    with torch.no_grad():
        router(on_page.ids)
    after = on_page.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert all(CALL not in vars(layer) for layer in on_page.anatomy.layers)
    assert torch.equal(on_page.run(), on_page.logits)


def test_it_is_trained_through_where_somebody_wants_to() -> None:
    model = tiny_model("llama")
    create_truncated_router(model, num_layers=1)(torch.tensor([[5, 6, 7]])).sum().backward()
    layers = model.model.layers
    assert layers[0].mlp.up_proj.weight.grad is not None
    assert all(p.grad is None for layer in layers[1:] for p in layer.parameters())


@pytest.mark.parametrize("type_", ["hrm_text", "xlm"])
def test_what_cannot_be_stopped_is_run_whole_and_said_so(type_: str) -> None:
    case = specimen(type_)
    with pytest.warns(RouterWarning, match="the router is the whole"):
        router = create_truncated_router(case.model, num_layers=1)
        with torch.no_grad():
            assert torch.equal(router(case.ids), case.logits)
    assert router.passthrough
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        router(case.ids)  # once is enough


@pytest.mark.parametrize("depth", [0, -1, 99, 1.5, True])
def test_a_depth_that_there_is_not_is_refused(depth: int) -> None:
    with pytest.raises(InvalidInput, match=r"num_layers = "):
        create_truncated_router(tiny_model("gpt2"), num_layers=depth)


def without_layers_after(case: Specimen, k: int) -> nn.Module:
    """A copy of the model whose stack really ends after k layers."""
    smaller = copy.deepcopy(case.model)
    path = next(
        name
        for name, module in case.model.named_modules()
        if isinstance(module, nn.ModuleList) and module[0] is case.anatomy.layers[0]
    )
    parent, _, name = path.rpartition(".")
    stack = smaller.get_submodule(path)
    assert isinstance(stack, nn.ModuleList)
    setattr(smaller.get_submodule(parent), name, stack[:k])
    smaller.config.num_hidden_layers = k
    return smaller
