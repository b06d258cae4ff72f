"""Neutral is invisible, detach restores, disabled() is temporary, the base saves unchanged."""

from __future__ import annotations

import copy
import inspect
import threading
from pathlib import Path

import pytest
import torch
from tests.minimal_adapter import (
    Scale,
    ScaleConfig,
    Warmup,
    WarmupConfig,
    anatomy_of,
    logits,
    same_anatomy,
    tiny_llama,
    trained,
)
from torch import nn

from pliant.adapters import attach, attached
from pliant.errors import AdapterError, InvalidInput


def scale(model: nn.Module, name: str | None = None, start: float = 1.0) -> Scale:
    return attach(model, Scale(model, ScaleConfig(start)), name)


def test_detach_leaves_nothing_behind() -> None:
    model = tiny_llama()
    before, expected = anatomy_of(model), logits(model)
    adapter = trained(scale(model))
    warmup = attach(model, Warmup(model, WarmupConfig()))
    assert not torch.equal(logits(model), expected)
    adapter.detach()
    warmup.detach()
    assert same_anatomy(anatomy_of(model), before)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
@pytest.mark.parametrize("kind", [Scale, Warmup])
def test_several_by_name_are_detached_in_any_order(order: str, kind: type) -> None:
    model = tiny_llama()
    before = anatomy_of(model)
    config = kind.config_class()
    adapters = {name: trained(attach(model, kind(model, config), name)) for name in "abc"}
    assert attached(model) == adapters
    for name in order:
        adapters.pop(name).detach()
        assert attached(model) == adapters
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    assert same_anatomy(anatomy_of(model), before)


def test_an_adapter_that_was_detached_can_be_attached_again() -> None:
    model, other = tiny_llama(), tiny_llama()
    adapter = trained(scale(model))
    expected = logits(model)
    adapter.detach()
    attach(other, adapter)
    assert torch.equal(logits(other), expected)


def test_a_name_that_is_taken_is_refused() -> None:
    model = tiny_llama()
    scale(model, "first")
    before = anatomy_of(model)
    with pytest.raises(AdapterError, match="'first' is taken"):
        scale(model, "first")
    assert same_anatomy(anatomy_of(model), before)


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "../a", "ä", "-a"])
def test_a_name_that_is_no_folder_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="cannot name an adapter"):
        scale(tiny_llama(), name)


@pytest.mark.parametrize("name", ["keys", "forward", "state_dict", "_modules"[1:], "0"])
def test_any_other_name_will_do(name: str) -> None:
    model = tiny_llama()
    scale(model, name)
    assert list(attached(model)) == [name]


def test_attached_twice_is_an_error() -> None:
    model = tiny_llama()
    adapter = scale(model)
    with pytest.raises(AdapterError, match="already attached"):
        attach(tiny_llama(), adapter)
    adapter.detach()
    with pytest.raises(AdapterError, match="not attached"):
        adapter.detach()


def test_a_model_with_a_pliant_of_its_own_is_left_alone() -> None:
    model = tiny_llama()
    model.pliant = nn.Linear(1, 1)
    with pytest.raises(AdapterError, match="has an attribute 'pliant' of its own"):
        scale(model)


class Broken(Scale):
    def wire(self, model):  # type: ignore[no-untyped-def]
        yield from super().wire(model)
        raise RuntimeError("no such layer")


def test_an_attachment_that_fails_half_way_is_undone() -> None:
    model = tiny_llama()
    before = anatomy_of(model)
    with pytest.raises(RuntimeError, match="no such layer"):
        attach(model, Broken(model, ScaleConfig()))
    assert same_anatomy(anatomy_of(model), before)


# --- disabled ------------------------------------------------------------------------------------


def test_disabled_is_the_base_and_nests() -> None:
    model = tiny_llama()
    base = logits(model)
    adapter = trained(scale(model))
    other = trained(scale(model, "other"), seed=3)
    both = logits(model)
    with adapter.disabled():
        assert not torch.equal(logits(model), both)
        with adapter.disabled(), other.disabled():
            assert torch.equal(logits(model), base)
        assert not torch.equal(logits(model), base)
    assert torch.equal(logits(model), both)


def test_disabled_ends_with_an_exception() -> None:
    model = tiny_llama()
    adapter = trained(scale(model))
    scaled = logits(model)
    with pytest.raises(KeyError), adapter.disabled():
        raise KeyError
    assert torch.equal(logits(model), scaled)


def test_disabled_blocks_may_end_in_any_order() -> None:
    """As when two generators are read in turns."""
    model = tiny_llama()
    adapter, other = trained(scale(model)), trained(scale(model, "other"), seed=3)
    both = logits(model)
    blocks = [adapter.disabled(), other.disabled(), adapter.disabled()]
    for block in blocks:
        block.__enter__()
    blocks[0].__exit__(None, None, None)
    blocks[1].__exit__(None, None, None)
    with adapter.disabled():
        only_other = logits(model)
    assert torch.equal(logits(model), only_other)
    blocks[2].__exit__(None, None, None)
    assert torch.equal(logits(model), both)


def test_disabled_in_one_thread_is_enabled_in_the_others() -> None:
    model = tiny_llama()
    base = logits(model)
    adapter = trained(scale(model))
    scaled = logits(model)
    wrong: list[str] = []

    def run(off: bool) -> None:
        for _ in range(50):
            if off:
                with adapter.disabled():
                    result = logits(model)
            else:
                result = logits(model)
            if not torch.equal(result, base if off else scaled):
                wrong.append("off" if off else "on")

    threads = [threading.Thread(target=run, args=(i % 2 == 0,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_disabled_reaches_a_patched_forward() -> None:
    model = tiny_llama().train()
    warmup = attach(model, Warmup(model, WarmupConfig(steps=4)))
    ids = torch.ones(1, 5, dtype=torch.long)
    with warmup.disabled():
        plain = model(input_ids=ids, labels=ids).loss
    assert torch.equal(model(input_ids=ids, labels=ids).loss, plain * 0.25)
    assert warmup.done == 1


# --- registered, and hidden ----------------------------------------------------------------------


def test_optimizers_see_it_and_the_base_state_dict_does_not() -> None:
    model = tiny_llama()
    stock = list(model.state_dict())
    adapter = scale(model)
    names = dict(model.named_parameters())
    assert names["pliant.minimal.embeddings"] is adapter.embeddings
    assert list(model.state_dict()) == stock
    assert list(nn.ModuleDict({"wrapped": model}).state_dict()) == [f"wrapped.{k}" for k in stock]
    assert not any("pliant" in key for key in model.state_dict()._metadata)
    assert set(adapter.state_dict()) == {"embeddings", "head"}


@pytest.mark.parametrize("assign", [False, True])
def test_a_stock_checkpoint_loads_strictly_and_leaves_the_adapter_alone(assign: bool) -> None:
    model, other = tiny_llama(0), tiny_llama(1)
    adapter = trained(scale(model))
    learned = adapter.embeddings.detach().clone()
    result = model.load_state_dict(other.state_dict(), strict=True, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(adapter.embeddings, learned)
    with adapter.disabled():
        assert torch.equal(logits(model), logits(other))


def test_missing_keys_of_the_base_are_still_reported() -> None:
    model = tiny_llama()
    scale(model)
    state = model.state_dict()
    del state["model.norm.weight"]
    assert model.load_state_dict(state, strict=False).missing_keys == ["model.norm.weight"]


def test_the_base_saves_as_the_stock_checkpoint(tmp_path: Path) -> None:
    model = tiny_llama()
    base = logits(model)
    model.save_pretrained(tmp_path / "stock")
    trained(scale(model))
    attach(model, Warmup(model, WarmupConfig()))
    model.save_pretrained(tmp_path / "with")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    again, report = type(model).from_pretrained(tmp_path / "with", output_loading_info=True)
    assert torch.equal(logits(again), base)
    assert not report["unexpected_keys"] and not report["missing_keys"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_change_of_the_base_dtype_passes_the_adapter_by(dtype: torch.dtype) -> None:
    model = tiny_llama()
    adapter = trained(scale(model))
    learned = adapter.embeddings.detach().clone()
    model.to(dtype)
    assert model.dtype == dtype
    assert adapter.embeddings.dtype == torch.float32
    assert torch.equal(adapter.embeddings, learned)
    model.to("meta")
    assert adapter.embeddings.is_meta and adapter.embeddings.dtype == torch.float32


def test_its_own_dtype_can_be_changed_on_purpose() -> None:
    model = tiny_llama()
    assert scale(model).half().embeddings.dtype == torch.float16


def test_it_follows_the_mode_of_the_model() -> None:
    for mode in (True, False):
        model = tiny_llama().train(mode)
        adapter = scale(model)
        assert adapter.training == mode
        model.train(not mode)
        assert adapter.training != mode


# --- copies, compilers, other people's patches ---------------------------------------------------


def test_a_copy_of_the_model_has_an_adapter_of_its_own() -> None:
    model = tiny_llama()
    base = logits(model)
    adapter = trained(scale(model))
    attach(model, Warmup(model, WarmupConfig()))
    scaled = logits(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        adapter.embeddings.zero_()
    assert torch.equal(logits(twin), scaled)
    with attached(twin)["minimal"].disabled():
        assert torch.equal(logits(twin), base)
    for copied in attached(twin).values():
        copied.detach()
    assert torch.equal(logits(twin), base)
    assert list(attached(model)) == ["minimal", "warmup"]


def test_a_copy_of_the_adapter_alone_is_loose_and_copies_no_base() -> None:
    model = tiny_llama()
    adapter = trained(scale(model))
    alone = copy.deepcopy(adapter)
    assert alone.name == "" and torch.equal(alone.embeddings, adapter.embeddings)
    assert adapter.base is model


def test_a_copy_of_both_has_them_joined_whichever_comes_first() -> None:
    model = tiny_llama()
    base = logits(model)
    adapter = trained(scale(model))
    twins = copy.deepcopy({"adapter": adapter, "model": model})
    assert attached(twins["model"]) == {"minimal": twins["adapter"]}
    assert twins["adapter"].base is twins["model"]
    twins["adapter"].detach()
    assert torch.equal(logits(twins["model"]), base)
    assert adapter.base is model


def test_attached_to_a_wrapper_it_is_on_the_model_inside() -> None:
    import peft

    model = tiny_llama()
    base = logits(model)
    first = trained(scale(model))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    second = trained(attach(wrapped, Scale(wrapped, ScaleConfig()), "second"), seed=3)
    both = {"minimal": first, "second": second}
    assert attached(wrapped) == attached(torch.compile(wrapped)) == attached(model) == both
    with pytest.raises(AdapterError, match="'second' is taken"):
        scale(model, "second")
    expected = logits(wrapped)
    unloaded = wrapped.unload()
    assert attached(unloaded) == both and torch.equal(logits(unloaded), expected)
    first.detach()
    second.detach()
    assert torch.equal(logits(unloaded), base)


def test_inside_peft_it_acts_and_stays_hidden() -> None:
    import peft

    model = tiny_llama()
    adapter = trained(scale(model))
    scaled = logits(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert attached(wrapped) == {"minimal": adapter}
    assert torch.equal(logits(wrapped), scaled)
    assert not any("pliant" in key for key in wrapped.state_dict())


def test_a_patched_forward_keeps_its_signature() -> None:
    model = tiny_llama()
    before = inspect.signature(model.forward)
    attach(model, Warmup(model, WarmupConfig()))
    assert inspect.signature(model.forward) == before


def test_detaching_puts_back_the_foreign_patch_that_was_there_before() -> None:
    model = tiny_llama()
    inner = model.forward
    model.forward = foreign = lambda *args, **kwargs: inner(*args, **kwargs)
    first = attach(model, Warmup(model, WarmupConfig()), "first")
    second = attach(model, Warmup(model, WarmupConfig()), "second")
    first.detach()
    second.detach()
    assert model.forward is foreign


def test_detaching_under_a_foreign_patch_spares_the_foreign_patch() -> None:
    model = tiny_llama().train()
    warmup = attach(model, Warmup(model, WarmupConfig()))
    inner, calls = model.forward, []

    def foreign(*args, **kwargs):  # type: ignore[no-untyped-def]
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = foreign
    ids = torch.ones(1, 5, dtype=torch.long)
    plain = type(model).forward(model, input_ids=ids, labels=ids).loss
    warmup.detach()
    assert torch.equal(model(input_ids=ids, labels=ids).loss, plain)
    assert calls and warmup.done == 0


@pytest.mark.parametrize("part", ["hooks", "patch"])
def test_it_compiles_into_one_graph_that_heeds_disabled(part: str) -> None:
    model = tiny_llama()
    base = logits(model)
    if part == "hooks":
        adapter = trained(scale(model))
    else:
        adapter = attach(model, Warmup(model, WarmupConfig()))
    eager = logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled), eager)
    with adapter.disabled():
        assert torch.equal(logits(compiled), base)
    assert torch.equal(logits(compiled), eager)


def test_generation_goes_through_it() -> None:
    model = tiny_llama()
    adapter = trained(scale(model))
    ids = torch.tensor([[1, 2, 3]])
    cached = model.generate(ids, max_new_tokens=8, do_sample=False)
    again = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, again)
    with adapter.disabled():
        plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    adapter.detach()
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), plain)
