"""Skips: what they compute, what they hold and for how long, and what they refuse."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from tests.minimal_adapter import logits, tiny_llama, trained
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from pliant import gradients as selective
from pliant.adapters import attached
from pliant.anatomy import Anatomy, run_first
from pliant.anatomy.depth import prove_depth
from pliant.errors import AdapterError, InvalidInput, UnsupportedModel
from pliant.structure import gates
from pliant.structure.skips import SkipConfig, Skips, attach

IDS = torch.arange(10, 24).view(2, 7)
BOTH = [SkipConfig(), SkipConfig("linear")]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama(num_hidden_layers=4)


def loss_of(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def layer_outputs(model: nn.Module) -> list[Tensor]:
    """What each layer gives to the next, and the last to the norm."""
    seen: list[Tensor] = []
    anatomy = Anatomy.of(model)
    after = [*anatomy.layers[1:], anatomy.norm]
    handles = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for m in after]
    logits(model)
    for handle in handles:
        handle.remove()
    return seen


# --- what they compute ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "pairs"), [(2, {1: 0}), (3, {2: 0}), (4, {2: 1, 3: 0}), (5, {3: 1, 4: 0})]
)
def test_each_layer_of_the_second_half_takes_from_its_mirror(
    layers: int, pairs: dict[int, int]
) -> None:
    assert attach(tiny_llama(num_hidden_layers=layers)).pairs == pairs


def test_a_layer_adds_its_mirrors_output_times_the_scale(model: LlamaForCausalLM) -> None:
    before = layer_outputs(model)
    skips = attach(model)
    with torch.no_grad():
        skips[3].copy_(torch.linspace(-1, 1, 16))
    after = layer_outputs(model)
    assert all(torch.equal(a, b) for a, b in zip(before[:3], after[:3], strict=True))
    assert torch.equal(after[3], before[3] + skips[3] * before[0])


def test_a_linear_fusion_reads_both(model: LlamaForCausalLM) -> None:
    before = layer_outputs(model)
    skips = attach(model, SkipConfig("linear"))
    with torch.no_grad():
        skips[3].fill_(0.5)
    skip: Any = skips.skips["3"]
    fused = torch.cat([before[3], before[0]], dim=-1) @ skip.weight.T + skip.bias
    assert torch.allclose(layer_outputs(model)[3], before[3] + 0.5 * fused, atol=1e-6)


def test_the_seed_decides_the_linear_fusion_and_no_other_random_number() -> None:
    state = torch.get_rng_state()
    first, same, other = (
        attach(tiny_llama(), SkipConfig("linear", seed)).state_dict() for seed in (1, 1, 2)
    )
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Skips(tiny_llama_without_draws(), SkipConfig("linear"))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first["skips.1.weight"], same["skips.1.weight"])
    assert not torch.equal(first["skips.1.weight"], other["skips.1.weight"])
    torch.set_rng_state(state)


def tiny_llama_without_draws() -> nn.Module:
    with torch.random.fork_rng():
        return tiny_llama()


@pytest.mark.parametrize("config", BOTH, ids=lambda config: config.fusion)
def test_training_moves_the_scales_and_lowers_the_loss(
    model: LlamaForCausalLM, config: SkipConfig
) -> None:
    model.requires_grad_(False)
    skips = attach(model, config)
    before = loss_of(model).item()
    optimizer = torch.optim.Adam(skips.parameters(), lr=0.05)
    for _ in range(8):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert all(skips[i].count_nonzero() == 16 for i in skips.pairs)
    assert loss_of(model).item() < before - 0.02
    skips.detach()
    assert loss_of(model).item() == before


def test_skips_live_beside_gates(model: LlamaForCausalLM) -> None:
    own = gates.attach(model)
    skips = trained(attach(model))
    assert attached(model) == {"structure": own, "skips": skips}
    with_skips = logits(model)
    with torch.no_grad():
        own["heads", 0][0] = 0
    assert not torch.equal(logits(model), with_skips)
    own.detach()
    assert torch.equal(logits(model), with_skips)


def test_a_compiled_model_runs_in_one_graph_and_sees_edits(model: LlamaForCausalLM) -> None:
    skips = trained(attach(model))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        with torch.no_grad():
            skips[2].mul_(2)
            output = compiled(input_ids=IDS, use_cache=False).logits
            assert torch.allclose(output, model(input_ids=IDS, use_cache=False).logits, atol=1e-6)
    compiled(input_ids=IDS, use_cache=False).logits.sum().backward()
    assert all(skips[i].grad is not None for i in skips.pairs)
    torch.compiler.reset()


# --- gradient checkpointing ----------------------------------------------------------------------


@pytest.mark.parametrize("config", BOTH, ids=lambda config: config.fusion)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(
    model: LlamaForCausalLM, config: SkipConfig, reentrant: bool
) -> None:
    trained(attach(model, config))
    model.train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for ours, theirs in zip(gradients(model), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_hooks_that_run_again_in_the_backward_pass_find_what_they_took(
    model: LlamaForCausalLM,
) -> None:
    """Checkpointing around a layer's call, its hooks included, with two forwards in one graph."""
    trained(attach(model))
    other = IDS.flip(0, 1)

    def both_gradients() -> list[Tensor]:
        model.zero_grad()
        losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for ids in (IDS, other)]
        (losses[0] + 2 * losses[1]).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = both_gradients()
    calls = checkpoint_calls(model, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(both_gradients(), expected, strict=True))
    assert len(calls) == 8


def test_reentrant_checkpointing_around_a_layers_hooks_is_refused(model: LlamaForCausalLM) -> None:
    attach(model)
    checkpoint_calls(model, use_reentrant=True)
    with pytest.raises(AdapterError, match="use_reentrant"):
        loss_of(model)


def checkpoint_calls(model: nn.Module, use_reentrant: bool) -> list[nn.Module]:
    """Checkpoint each layer's call, as older transformers and the wrapper of FSDP do."""
    calls: list[nn.Module] = []
    for layer in Anatomy.of(model).layers:

        def call(*args: Any, layer: Any = layer, **kwargs: Any) -> Any:
            calls.append(layer)
            run = partial(layer._call_impl, **kwargs)
            return checkpoint(run, *args, use_reentrant=use_reentrant)

        layer._compiled_call_impl = call
    return calls


# --- what is held --------------------------------------------------------------------------------


def watch(skips: Skips) -> list[weakref.ref[Tensor]]:
    """A weak reference to each output that is held from now on."""
    seen: list[weakref.ref[Tensor]] = []
    for source in skips.pairs.values():
        skips.anatomy.layers[source].register_forward_hook(
            lambda module, args, output: seen.append(weakref.ref(output))
        )
    return seen


def test_no_output_outlives_its_forward(model: LlamaForCausalLM) -> None:
    outputs = watch(attach(model))
    logits(model)
    loss_of(model).backward()
    gc.collect()
    assert len(outputs) == 4
    assert all(output() is None for output in outputs)


def test_no_output_outlives_a_forward_that_fails(model: LlamaForCausalLM) -> None:
    outputs = watch(attach(model))

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = Anatomy.of(model).layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        logits(model)
    handle.remove()
    gc.collect()
    assert len(outputs) == 2
    assert all(output() is None for output in outputs)


def test_threads_do_not_take_from_each_other(model: LlamaForCausalLM) -> None:
    """Both forwards are between layers 1 and 2 at the same time; then they end one by one."""
    trained(attach(model))
    alone = {seed: logits(model, seed) for seed in (1, 2)}
    half, first_is_done = threading.Barrier(2, timeout=60), threading.Event()
    results: dict[int, Tensor] = {}

    def wait_at_half(*_: Any) -> None:
        half.wait()
        if threading.current_thread().name == "2":
            first_is_done.wait(60)

    def run(seed: int) -> None:
        results[seed] = logits(model, seed)
        first_is_done.set()

    Anatomy.of(model).layers[2].register_forward_pre_hook(wait_at_half)
    threads = [threading.Thread(target=run, args=(seed,), name=str(seed)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], alone[seed]) for seed in alone)


def test_a_copy_of_the_model_has_skips_of_its_own(model: LlamaForCausalLM) -> None:
    skips = trained(attach(model))
    expected = logits(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        skips[2].zero_()
    assert torch.equal(logits(copied), expected)
    assert not torch.equal(logits(model), expected)


# --- models that run in pieces -------------------------------------------------------------------


def test_a_model_stopped_after_some_layers_resumes_to_its_own_output(
    model: LlamaForCausalLM,
) -> None:
    trained(attach(model))
    proof = prove_depth(model, IDS)
    assert (proof.first_layers, proof.resume) == (None, None)
    full = model(input_ids=IDS).logits
    for k in (1, 2, 3, 4):
        assert torch.equal(run_first(model, k, input_ids=IDS).resume().logits, full)


def test_a_layer_alone_cannot_take(model: LlamaForCausalLM) -> None:
    skips = attach(model)
    inputs: list[Any] = []
    layer = Anatomy.of(model).layers[3]
    layer.register_forward_pre_hook(lambda _, *given: inputs.append(given), with_kwargs=True)
    logits(model)
    args, kwargs = inputs[0]
    with pytest.raises(AdapterError, match="layer 3 runs outside its model's forward"):
        layer(*args, **kwargs)
    with skips.disabled():
        layer(*args, **kwargs)


def test_layers_that_see_different_positions_are_refused(model: LlamaForCausalLM) -> None:
    last = Anatomy.of(model).layers[3]
    last.register_forward_hook(lambda module, args, output: output.repeat(1, 2, 1))
    attach(model)
    with pytest.raises(UnsupportedModel, match=r"\[2, 14, 16\].*\[2, 7, 16\]"):
        logits(model)


def test_selective_training_stays_sparse_and_exact(model: LlamaForCausalLM) -> None:
    """The sparse engine's second pass runs layers, and so skips, on the chosen positions alone."""
    trained(attach(model))
    model.train()
    loss_of(model).backward()
    dense = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    gradients = selective.attach(model, selective.GradientConfig(engine="sparse", ratio=1.0))
    loss_of(model).backward()
    assert gradients.engine == "sparse" and len(dense) > 20
    for name, p in model.named_parameters():
        if name in dense:
            assert p.grad is not None and torch.allclose(p.grad, dense[name], atol=1e-5), name


# --- refusals ------------------------------------------------------------------------------------


def test_one_layer_has_no_mirror() -> None:
    with pytest.raises(UnsupportedModel, match="has 1 layer: a skip needs two"):
        attach(tiny_llama(num_hidden_layers=1))


def test_a_layer_without_a_skip_is_named(model: LlamaForCausalLM) -> None:
    with pytest.raises(InvalidInput, match="no skip ends in layer 0; there are 2, 3"):
        attach(model)[0]


@pytest.mark.parametrize("options", [{"fusion": "add"}, {"seed": -1}, {"seed": 0.5}])
def test_a_setting_that_means_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        SkipConfig(**options)


def test_skips_say_why_they_cannot_be_exported() -> None:
    assert "no place in a stock checkpoint" in Skips.why_no_export
    assert gates.Gates.why_no_export == ""
