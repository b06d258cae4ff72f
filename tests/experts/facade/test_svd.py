"""The seed's names: U, S and V^T of a weight, and a model whose z learns."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.contracts.conftest import QUICK
from tests.experts.models import IDS, logits, with_experts
from tests.minimal_adapter import tiny_llama
from torch import nn
from transformers.modeling_outputs import ModelOutput

from pliant.anatomy.tiny import tiny_model
from pliant.errors import InvalidInput
from pliant.experts.expert import Expert
from pliant.experts.export import merge
from pliant.experts.facade.svd import SvdComponent, SVFWrapper
from pliant.experts.model import svf_layers

UP = "model_layers_0_mlp_up_proj"


def wrapped(**settings: Any) -> SVFWrapper:
    return SVFWrapper(tiny_llama().eval(), **settings)


def scatter(wrapper: SVFWrapper, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for z in wrapper.z.values():
            z.copy_(1 + 0.2 * torch.randn(z.shape, generator=generator))


class TestSvdComponent:
    @pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (3, 5, 9), (3, 9, 5)])
    def test_it_is_the_svd(self, shape: tuple[int, ...]) -> None:
        weight = torch.randn(shape)
        U, S, Vt = component = SvdComponent.of(weight)
        assert torch.allclose(S, torch.linalg.svdvals(weight), atol=1e-5)
        eye = torch.eye(S.shape[-1]).expand(*shape[:-2], -1, -1)
        assert torch.allclose(U.mT @ U, eye, atol=1e-3)
        assert torch.allclose(Vt @ Vt.mT, eye, atol=1e-3)
        assert torch.allclose(component.reconstruct(), weight, atol=1e-5)

    def test_z_scales_the_singular_values(self) -> None:
        component = SvdComponent.of(torch.randn(5, 9))
        z = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
        values = torch.linalg.svdvals(component.reconstruct(z))
        expected = (component.S * z).sort(descending=True).values
        assert torch.allclose(values, expected, atol=1e-5)

    def test_a_weight_without_full_rank_has_no_nan(self) -> None:
        weight = torch.outer(torch.randn(5), torch.randn(9))
        component = SvdComponent.of(weight)
        assert torch.allclose(component.reconstruct(), weight, atol=1e-5)
        assert torch.equal(SvdComponent.of(torch.zeros(2, 3)).reconstruct(), torch.zeros(2, 3))

    def test_the_largest_alone(self) -> None:
        component = SvdComponent.of(torch.randn(5, 9), rank=2)
        assert [tuple(t.shape) for t in component] == [(5, 2), (2,), (2, 9)]

    def test_a_vector_is_refused(self) -> None:
        with pytest.raises(InvalidInput, match="no singular values"):
            SvdComponent.of(torch.randn(5))


class TestSVFWrapper:
    @pytest.mark.parametrize("name", QUICK)
    def test_it_starts_neutral_and_learns(self, name: str) -> None:
        """The seed's own loop, with the weights patched before each step."""
        model = tiny_model(name)
        ids = IDS % model.config.get_text_config().vocab_size
        model.requires_grad_(False)
        plain = logits(model, ids)
        wrapper = SVFWrapper(model)
        assert torch.equal(logits(wrapper, ids), plain)
        assert all(bool((z == 1).all()) for z in wrapper.z.values())
        assert {id(p) for p in wrapper.parameters() if p.requires_grad} == {
            id(z) for z in wrapper.z.values()
        }
        before = {k: v.clone() for k, v in weights(wrapper).items()}
        optimizer = torch.optim.Adam(wrapper.z.parameters(), lr=0.02)
        losses = []
        for _ in range(4):
            wrapper.patch_weights()
            output = wrapper(ids, labels=ids)
            assert isinstance(output, ModelOutput)
            losses.append(float(output.loss.detach()))
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
        assert losses[-1] < losses[0]
        wrapper.patch_weights()
        patched = logits(wrapper, ids)
        wrapper.restore_weights()
        assert torch.allclose(patched, logits(wrapper, ids), atol=1e-4)
        assert all(torch.equal(before[k], v) for k, v in weights(wrapper).items())

    @pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
    def test_patching_writes_the_seeds_formula(self, name: str) -> None:
        wrapper = SVFWrapper(tiny_model(name))
        scatter(wrapper)
        components = wrapper.components()
        wrapper.patch_weights()
        for key, component in components.items():
            z = wrapper.z[key]
            assert z.shape == component.S.shape
            layer = wrapper._layers[key]
            expected = component.reconstruct(z.detach())
            assert torch.allclose(layer.own_weight(), expected, atol=1e-5)
            kept = wrapper.component(key)
            assert torch.equal(kept.S, component.S)

    def test_patching_again_takes_z_as_it_is_now(self) -> None:
        wrapper = wrapped()
        wrapper.patch_weights()
        scatter(wrapper, 1)
        wrapper.patch_weights()
        patched = logits(wrapper)
        other = wrapped()
        scatter(other, 1)
        assert torch.allclose(patched, logits(other), atol=1e-5)
        assert not torch.allclose(patched, logits(wrapped()), atol=1e-3)

    def test_the_layers_change_is_exactly_z_minus_one(self) -> None:
        wrapper = wrapped()
        optimizer = torch.optim.AdamW(wrapper.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            wrapper(IDS, labels=IDS).loss.backward()
            optimizer.step()
        for key, layer in wrapper._layers.items():
            assert torch.equal(layer.changes()["default"], wrapper.z[key] - 1)
            assert wrapper.z[key].grad is not None

    def test_the_gradient_is_that_of_the_rebuilt_weight(self) -> None:
        wrapper = wrapped()
        scatter(wrapper)
        wrapper(IDS, labels=IDS).loss.backward()
        plain = tiny_llama().eval()
        z = wrapper.z[UP].detach().clone().requires_grad_()
        parameters = {name: p.detach() for name, p in plain.named_parameters()}
        for key, component in wrapper.components().items():
            path = wrapper_path(wrapper, key)
            value = z if key == UP else wrapper.z[key].detach()
            parameters[f"{path}.weight"] = component.reconstruct(value)
        loss = torch.func.functional_call(plain, parameters, (IDS,), {"labels": IDS}).loss
        (gradient,) = torch.autograd.grad(loss, z)
        assert torch.allclose(wrapper.z[UP].grad, gradient, rtol=1e-3, atol=1e-6)

    def test_saved_z_loads(self, tmp_path: Path) -> None:
        first, second, third, fourth = (wrapped() for _ in range(4))
        scatter(first)
        torch.save(first.z.state_dict(), tmp_path / "zparams_math.pt")
        second.load_z(torch.load(tmp_path / "zparams_math.pt"))
        first.save_pretrained(tmp_path / "math")
        third.patch_weights()
        third.load_z(tmp_path / "math")
        fourth.load_state_dict(first.state_dict())
        assert third.is_patched
        expected = logits(first)
        for each in (second, third, fourth):
            assert torch.allclose(logits(each), expected, atol=1e-5)
            for key, z in each.z.items():
                assert torch.allclose(z, first.z[key], atol=2e-7)

    def test_peft_loads_and_saves_it(self, tmp_path: Path) -> None:
        wrapper = wrapped()
        scatter(wrapper)
        wrapper.model.save_pretrained(tmp_path / "peft")
        wrapper.save_pretrained(tmp_path / "own")
        assert Expert.load(tmp_path / "peft") == Expert.load(tmp_path / "own") == wrapper.expert()
        loaded = PeftModel.from_pretrained(tiny_llama().eval(), tmp_path / "own").eval()
        assert torch.allclose(logits(loaded), logits(wrapper), atol=1e-5)

    def test_it_leaves_as_a_stock_checkpoint(self, tmp_path: Path) -> None:
        wrapper = wrapped()
        scatter(wrapper)
        assert merge(wrapper, tmp_path / "merged").matrices == 14

    def test_settings_are_those_of_an_expert(self) -> None:
        wrapper = wrapped(parts="mlp", rank=3)
        assert len(wrapper.z) == 6 and {tuple(z.shape) for z in wrapper.z.values()} == {(3,)}
        scatter(wrapper)
        kept = wrapper.component(UP)
        assert kept.S.shape == (3,)

    def test_unloading_gives_the_model_back(self) -> None:
        model = tiny_llama().eval()
        plain = logits(model)
        modules = {type(m) for m in model.modules()}
        wrapper = SVFWrapper(model)
        scatter(wrapper)
        wrapper.patch_weights()
        assert wrapper.unload() is model
        assert torch.equal(logits(model), plain)
        assert {type(m) for m in model.modules()} == modules

    def test_it_answers_like_the_model(self) -> None:
        wrapper = wrapped()
        assert wrapper.config is wrapper.get_base_model().config
        tokens = wrapper.generate(IDS, max_new_tokens=3, do_sample=False)
        assert tokens.shape == (3, 12)
        with pytest.raises(AttributeError):
            wrapper.nothing_of_this_name  # noqa: B018
        twin = deepcopy(wrapper)
        scatter(twin)
        assert torch.equal(twin._layers[UP].changes()["default"], twin.z[UP] - 1)
        assert bool((wrapper.z[UP] == 1).all())

    def test_an_adapted_model_is_refused(self) -> None:
        with pytest.raises(InvalidInput, match="wrap the base model itself"):
            SVFWrapper(with_experts("math"))
        with pytest.raises(InvalidInput, match="wrap the base model itself"):
            SVFWrapper(wrapped())
        with pytest.raises(InvalidInput, match="no z 'up'"):
            wrapped().component("up")


def weights(wrapper: SVFWrapper) -> dict[str, torch.Tensor]:
    return {name: p for name, p in wrapper.model.named_parameters() if not p.requires_grad}


def wrapper_path(wrapper: SVFWrapper, key: str) -> str:
    paths = {id(layer): path for path, layer in svf_layers(wrapper.get_base_model())}
    return paths[id(wrapper._layers[key])]


def test_z_is_a_parameter_dict() -> None:
    assert isinstance(wrapped().z, nn.ParameterDict)
