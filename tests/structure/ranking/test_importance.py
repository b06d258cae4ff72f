"""Scores agree with what they stand for, measured by hand, and the model stays as it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.conftest import specimen
from tests.minimal_adapter import (
    Scale,
    ScaleConfig,
    anatomy_of,
    same_anatomy,
    tiny_llama,
    trained,
)
from torch import Tensor, nn

from pliant import Anatomy, adapters, nano
from pliant.errors import CorruptFile, InvalidInput, UnsupportedModel
from pliant.loading import load
from pliant.structure import (
    GateConfig,
    Importance,
    ImportanceConfig,
    attach,
    calibration_batches,
    importance,
    sites_of,
)
from pliant.structure.config import KINDS, Kind
from pliant.structure.ranking.measures import NEEDS_NO_TEXT, RANKS, SCORES, Score, scores_for
from pliant.structure.ranking.meters import column_squares

IDS = torch.randint(0, 60, (4, 9), generator=torch.Generator().manual_seed(3))
BATCHES = [{"input_ids": IDS[:3]}, {"input_ids": IDS[3:]}]
TOKENS = 4 * 8  # predicted ones


def scored(
    model: nn.Module, kind: Kind, score: Score, batches: Any = BATCHES, **options: Any
) -> Importance:
    return importance(model, batches, ImportanceConfig((kind,), score), **options)


def everything(scores: Importance) -> Tensor:
    return torch.cat([values for sites in scores.units.values() for values in sites.values()])


def loss_of(model: nn.Module, ids: Tensor) -> float:
    """The sum over the predicted tokens."""
    with torch.no_grad():
        mean = model(input_ids=ids, labels=ids, use_cache=False).loss
    return float(mean) * ids[:, 1:].numel()


@contextmanager
def scaled(model: Any, kind: Kind, layer: int, unit: int, by: float) -> Iterator[None]:
    """The weights that read the unit, times a number."""
    block = model.model.layers[layer]
    weight = (block.self_attn.o_proj if kind == "heads" else block.mlp.down_proj).weight.data
    width = model.config.head_dim if kind == "heads" else 1
    own = weight[:, unit * width : (unit + 1) * width]
    before = own.clone()
    own *= by
    try:
        yield
    finally:
        own.copy_(before)


@pytest.mark.parametrize("kind", ["heads", "channels"])
def test_gradient_scores_agree_with_finite_differences(kind: Kind) -> None:
    model = tiny_llama(initializer_range=0.3).double()
    fisher, taylor = (scored(model, kind, score) for score in ("fisher", "taylor"))
    for layer, unit in [(0, 0), (0, 1), (1, 1)]:
        slopes = []
        for row in IDS:
            losses = []
            for by in (1 - 1e-2, 1 + 1e-2):
                with scaled(model, kind, layer, unit, by):
                    losses.append(loss_of(model, row[None]))
            slopes.append((losses[1] - losses[0]) / 2e-2)
        squares = sum(slope**2 for slope in slopes)
        assert fisher[kind, layer][unit] == pytest.approx(squares / 2 / TOKENS, rel=0.01)
        assert taylor[kind, layer][unit] == pytest.approx(abs(sum(slopes)) / TOKENS, rel=0.01)


@pytest.mark.parametrize("kind", ["heads", "channels"])
def test_leaving_one_out_is_a_difference_of_losses(kind: Kind) -> None:
    model = tiny_llama(initializer_range=0.3, intermediate_size=6)
    scores = scored(model, kind, "leave_one_out")
    with_it = loss_of(model, IDS) / TOKENS
    assert scores.loss == pytest.approx(with_it, rel=1e-5)
    for layer, unit in [(0, 0), (1, 1)]:
        with scaled(model, kind, layer, unit, 0):
            change = loss_of(model, IDS) / TOKENS - with_it
        assert scores[kind, layer][unit] == pytest.approx(change, abs=1e-5)
        assert abs(change) > 1e-3
    assert scores.cost.forwards == 1 + everything(scores).numel()


def test_block_influence_is_one_minus_a_cosine() -> None:
    model = tiny_llama(initializer_range=0.3)
    states = model(input_ids=IDS, output_hidden_states=True).hidden_states
    expected = 1 - torch.cosine_similarity(states[0], states[1], dim=-1).mean()
    scores = scored(model, "layers", "block_influence")
    assert scores["layers", 0].item() == pytest.approx(expected.item(), rel=1e-4)


def test_activation_is_a_root_mean_square_times_the_weights() -> None:
    model = tiny_llama(initializer_range=0.3)
    inputs: dict[str, Tensor] = {}
    layer = model.model.layers[1]
    handles = [
        module.register_forward_pre_hook(lambda m, args, n=name: inputs.update({n: args[0]}))
        for name, module in (("heads", layer.self_attn.o_proj), ("channels", layer.mlp.down_proj))
    ]
    model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    squares = inputs["heads"].square().mean(
        dim=(0, 1)
    ) * layer.self_attn.o_proj.weight.square().sum(0)
    heads = squares.view(2, -1).sum(dim=1).sqrt()
    assert torch.allclose(
        scored(model, "heads", "activation")["heads", 1].float(), heads, rtol=1e-4
    )
    rms = inputs["channels"].square().mean(dim=(0, 1)).sqrt()
    channels = rms * layer.mlp.down_proj.weight.norm(dim=0)
    own = scored(model, "channels", "activation")["channels", 1]
    assert torch.allclose(own.float(), channels, rtol=1e-4)


def test_experts_by_what_they_add_and_how_often_they_are_chosen() -> None:
    model = specimen("mixtral").model
    block, seen = model.model.layers[1].mlp, []
    handle = block.experts.register_forward_pre_hook(lambda m, args: seen.append(args))
    batch = {"input_ids": specimen("mixtral").ids}
    model(**batch)
    handle.remove()
    ((x, index, weights),) = seen
    after = model(**batch, output_hidden_states=True).hidden_states[2].flatten(0, 1)
    for expert in range(block.experts.num_experts):
        gate, up = (x @ block.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        output = (block.experts.act_fn(gate) * up) @ block.experts.down_proj[expert].T
        weight = (weights * (index == expert)).sum(dim=1)
        expected = (weight * output.norm(dim=1)).mean().item()
        activation = scored(model, "experts", "activation", [batch])["experts", 1][expert]
        assert activation == pytest.approx(expected, rel=1e-4)
        expected = (weight * output.norm(dim=1) / after.norm(dim=1)).mean().item()
        relative = scored(model, "experts", "relative_activation", [batch])["experts", 1][expert]
        assert relative == pytest.approx(expected, rel=1e-4)
        frequency = scored(model, "experts", "frequency", [batch])["experts", 1][expert]
        assert frequency == pytest.approx((index == expert).any(1).float().mean().item())


def test_entropy_is_that_of_the_attention() -> None:
    model = tiny_llama(initializer_range=1.0, attn_implementation="sdpa")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[:8] = 0  # head 0 attends uniformly
    scores = scored(model, "heads", "entropy")
    assert model.config._attn_implementation == "sdpa"
    assert scores["heads", 1][0].item() == pytest.approx(0, abs=1e-6)
    model.config._attn_implementation = "eager"
    p = model(input_ids=IDS, output_attentions=True).attentions[1][:, 1]
    shares = torch.special.entr(p).sum(dim=-1)[:, 1:] / torch.arange(2, 10).log()
    assert scores["heads", 1][1].item() == pytest.approx((1 - shares).sum().item() / 36, rel=1e-4)


INFORMED: tuple[Score, ...] = ("fisher", "taylor", "activation", "magnitude")


@pytest.mark.parametrize(
    ("kind", "score"),
    [
        *((kind, score) for kind in ("heads", "channels") for score in INFORMED),
        ("heads", "leave_one_out"),  # a forward pass for each channel takes long
    ],
)
def test_a_useless_unit_is_ranked_last(kind: Kind, score: Score) -> None:
    model, tokenizer = load("nano-s", dtype="float32")
    batches = calibration_batches(nano.conversations("train", 60), tokenizer, tokens=600)
    site = sites_of(Anatomy.of(model), [kind])[1]
    with torch.no_grad():
        weight: Any = site.module.weight
        weight.narrow(site.axis, 2 * site.width, site.width).zero_()
    scores = scored(model, kind, score, batches)
    lowest = scores[kind, site.layer][2].item()
    assert lowest == pytest.approx(0, abs=1e-12)
    assert lowest <= everything(scores).min().item() + 1e-12


def test_the_order_of_batches_does_not_matter() -> None:
    model = tiny_llama()
    for kind, score in [("heads", "fisher"), ("channels", "activation"), ("layers", "taylor")]:
        forwards, backwards = (scored(model, kind, score, b) for b in (BATCHES, BATCHES[::-1]))  # type: ignore[arg-type]
        assert torch.allclose(everything(forwards), everything(backwards), rtol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("score", [score for score in SCORES if score not in NEEDS_NO_TEXT])
def test_padding_counts_nowhere(score: Score, side: str) -> None:
    model = tiny_llama(initializer_range=0.3)
    if RANKS[score] == ("experts",):
        model = specimen("mixtral").model
    kinds = tuple(kind for kind in ("heads", "layers", "experts") if score in scores_for(kind))
    kinds = kinds if score == "frequency" else kinds[:1]
    alone = [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:2, :5]}]
    pads = torch.full((1, 4), 7)
    row = [pads, IDS[1:2, :5]] if side == "left" else [IDS[1:2, :5], pads]
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5 if side == "left" else [1] * 5 + [0] * 4])
    padded = {"input_ids": torch.cat([IDS[:1], torch.cat(row, dim=1)]), "attention_mask": mask}
    expected, ours = (
        importance(model, batches, ImportanceConfig(kinds, score)) for batches in (alone, [padded])
    )
    assert ours.tokens == expected.tokens == 8 + 4
    assert torch.allclose(everything(ours), everything(expected), rtol=1e-3, atol=1e-6)
    assert everything(ours).any()


def test_labels_say_which_tokens_count() -> None:
    model, labels = tiny_llama(), IDS.clone()
    labels[:, :6] = -100
    scores = scored(model, "heads", "fisher", [{"input_ids": IDS, "labels": labels}])
    assert scores.tokens == 4 * 3
    assert scores.loss == pytest.approx(model(input_ids=IDS, labels=labels).loss.item(), rel=1e-5)


# Transposed weights, several streams, experts, layers without attention, and two layouts of a batch
# in which sequences cannot have gates of their own.
ARCHITECTURES = ("gpt2", "opt", "gemma3n_text", "mixtral", "jamba", "xlnet", "prophetnet")


@pytest.mark.parametrize("name", ["llama-bf16", *ARCHITECTURES])
def test_every_score_that_fits_runs_and_leaves_no_trace(name: str) -> None:
    dtype = torch.bfloat16 if name.endswith("-bf16") else torch.float32
    own = specimen(name.removesuffix("-bf16"), dtype)
    before, run = anatomy_of(own.model), 0
    batch = {"input_ids": own.ids}
    for kind in KINDS:
        try:
            sites = sites_of(own.anatomy, [kind])
        except UnsupportedModel:
            continue
        units = sum(site.count for site in sites)
        for score in scores_for(kind):
            if score == "leave_one_out" and units > 20:
                continue
            if score in ("activation", "entropy") and sites[0].slices is not None:
                with pytest.raises(UnsupportedModel, match=f"{score} needs one"):
                    scored(own.model, kind, score, [batch])
                continue
            scores = scored(own.model, kind, score, [batch])
            assert everything(scores).shape == (units,) and everything(scores).any()
            run += 1
    assert run >= 12
    assert same_anatomy(anatomy_of(own.model), before)
    assert torch.equal(own.run(), own.logits)


@pytest.mark.parametrize("name", ["llama", "xlnet", "prophetnet", "llama4_text"])
def test_a_batch_equals_its_sequences_one_by_one(name: str) -> None:
    own = specimen(name)
    units: tuple[Kind, ...] = ("experts" if name == "llama4_text" else "channels", "layers", "mlp")
    config = ImportanceConfig(units)
    together = importance(own.model, [{"input_ids": own.ids}], config)
    alone = importance(own.model, [{"input_ids": row[None]} for row in own.ids], config)
    assert torch.allclose(everything(together), everything(alone), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("score", ["fisher", "activation", "leave_one_out", "entropy"])
def test_after_an_error_the_model_is_as_it_was(score: Score) -> None:
    model = tiny_llama().train()
    before = anatomy_of(model)
    broken = [*BATCHES, {"input_ids": IDS + 1000}]
    with pytest.raises(IndexError):
        scored(model, "heads", score, broken)
    assert same_anatomy(anatomy_of(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_other_adapters_stay_and_act() -> None:
    model = tiny_llama(initializer_range=0.3)
    plain = everything(scored(model, "heads", "fisher"))
    trained(adapters.attach(model, Scale(model, ScaleConfig())))
    gates = attach(model, name="importance")
    with torch.no_grad():
        gates["heads", 1][0] = 0
    for score in ("fisher", "activation", "leave_one_out"):
        scores = scored(model, "heads", score)  # type: ignore[arg-type]
        assert scores["heads", 1][0] == 0 and scores["heads", 0].all()
    assert not torch.allclose(everything(scored(model, "heads", "fisher")), plain)
    assert list(adapters.attached(model)) == ["minimal", "importance"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_that_cannot_be_read_are_measured_by_calls(name: str) -> None:
    site = sites_of(specimen(name).anatomy, ["heads"])[0]
    plain = column_squares(site)
    site.module.base_layer = None  # as in a layer that wraps the projection
    try:
        assert torch.allclose(column_squares(site), plain, rtol=1e-4)
    finally:
        del site.module.base_layer


# --- leave_one_out goes on -----------------------------------------------------------------------


def stop_after(steps: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done > steps:
            raise KeyboardInterrupt

    return progress


def test_leaving_one_out_goes_on_after_an_interrupt(tmp_path: Path) -> None:
    model, file = tiny_llama(), tmp_path / "units.jsonl"
    expected = scored(model, "heads", "leave_one_out")
    with pytest.raises(KeyboardInterrupt):
        scored(model, "heads", "leave_one_out", progress=stop_after(2), resume=file)
    steps: list[tuple[int, int]] = []
    scores = scored(
        model, "heads", "leave_one_out", progress=lambda *step: steps.append(step), resume=file
    )
    assert torch.equal(everything(scores), everything(expected))
    assert scores.cost.forwards == 1 + 4 - 2
    assert steps == [(done, 5) for done in range(1, 6)]


@pytest.mark.parametrize("other", ["model", "text"])
def test_a_file_of_another_run_is_refused(tmp_path: Path, other: str) -> None:
    file = tmp_path / "units.jsonl"
    scored(tiny_llama(), "heads", "leave_one_out", resume=file)
    model, batches = (tiny_llama(seed=1, initializer_range=0.5), BATCHES)
    if other == "text":
        model, batches = tiny_llama(), BATCHES[:1]
    with pytest.raises(InvalidInput, match="another model or another calibration text"):
        scored(model, "heads", "leave_one_out", batches, resume=file)
    with pytest.raises(InvalidInput, match="only leave_one_out"):
        scored(model, "heads", "fisher", resume=file)


# --- the result ----------------------------------------------------------------------------------


def result(**units: dict[str, list[float]]) -> Importance:
    content = {"score": "fisher", "tokens": 7, "loss": 1.5, "units": units}
    return Importance.from_dict(content | {"cost": {"forwards": 1, "backwards": 1, "seconds": 2.0}})


def test_the_lowest_units() -> None:
    scores = result(heads={"0": [5, 1, 2, 8], "1": [9, 7, 6, 3]})
    assert scores.lowest("heads", 0.5) == {"0": [1, 2, 0], "1": [3]}
    assert scores.lowest("heads", 0.5, uniform=True) == {"0": [1, 2], "1": [3, 2]}
    assert scores.lowest("heads", 0) == {"0": [], "1": []}
    with pytest.raises(InvalidInput, match=r"share = 1\.5"):
        scores.lowest("heads", 1.5)
    with pytest.raises(InvalidInput, match="layers were not ranked"):
        scores.lowest("layers", 0.5)


def test_a_result_survives_json_and_is_one_sentence() -> None:
    scores = result(heads={"0": [0.1, 0.2]}, layers={"0": [3.0], "1_1": [2.0]})
    again = Importance.from_dict(json.loads(json.dumps(scores.as_dict())))
    assert again.as_dict() == scores.as_dict()
    assert str(again) == (
        "fisher on 7 predicted tokens ranks 2 heads, from head 0 of layer 0 (0.1) to head 1 of "
        "layer 0 (0.2); 2 layers, from layer 1, block 1 (2) to layer 0 (3) "
        "(1 forward pass, 1 backward pass, 2.0 s)"
    )
    assert torch.equal(again["layers", 1, 1], torch.tensor([2.0]).double())
    with pytest.raises(CorruptFile):
        Importance.from_dict({"units": {}})


def test_random_is_the_same_for_a_seed() -> None:
    model = tiny_llama()
    first, again, other = (
        everything(importance(model, config=ImportanceConfig(("heads",), "random", seed)))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": ("heads", "layers"), "score": "entropy"}, "not layers: for layers give one of"),
        ({"units": ("heads",), "score": "block_influence"}, "fisher, taylor, activation, leave"),
        ({"units": ("heads",), "score": "fishr"}, "score = 'fishr'"),
        ({"units": ("toes",)}, "units = 'toes'"),
        ({"units": ()}, "name a kind"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_a_wrong_configuration_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ImportanceConfig(**options)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "needs calibration batches"),
        ([{"labels": IDS}], "needs input_ids, and has labels"),
        ([IDS], "needs input_ids, and has Tensor"),
        ([{"input_ids": IDS, "labels": torch.full_like(IDS, -100)}], "no token"),
        ([{"input_ids": IDS, "attention_mask": IDS[:, :2]}], "attention_mask"),
    ],
)
def test_a_wrong_batch_is_refused(batches: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        scored(tiny_llama(), "heads", "fisher", batches)


def test_numbers_that_overflow_are_an_error() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(InvalidInput, match="is not finite"):
        scored(model, "heads", "fisher")
    with pytest.raises(InvalidInput, match="is not finite"):
        scored(model, "channels", "magnitude")


# --- calibration text ----------------------------------------------------------------------------


def test_calibration_text_is_spread_over_the_source() -> None:
    _, tokenizer = load("nano-s")
    texts = [f"{i} plus {i} is {2 * i}. " * 4 for i in range(50)]
    batches = calibration_batches(texts, tokenizer, tokens=320, length=32, rows=4)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.numel() == 320 and all(batch["input_ids"].shape[0] <= 4 for batch in batches)
    decoded = tokenizer.decode(ids[-1])
    assert any(f"{i} plus" in decoded for i in range(40, 50)), decoded
    rows = [{"text": text} for text in texts]
    again = calibration_batches(rows, tokenizer, tokens=320, length=32, rows=4)
    assert torch.equal(again[0]["input_ids"], batches[0]["input_ids"])


def test_text_that_is_too_short_says_how_long_it_is() -> None:
    _, tokenizer = load("nano-s")
    with pytest.raises(InvalidInput, match=r"too short: it has \d+ tokens, and 9,000 are needed"):
        calibration_batches("a short text", tokenizer, tokens=9000)
    with pytest.raises(InvalidInput, match="tokens = 0"):
        calibration_batches("a short text", tokenizer, tokens=0)


def test_gates_of_the_units_are_those_that_are_ranked() -> None:
    """`scores[kind, layer]` and `gates[kind, layer]` have the same shape and order."""
    own = specimen("jamba")
    scores = importance(own.model, config=ImportanceConfig(("heads", "experts"), "random"))
    gates = attach(own.model, GateConfig(("heads", "experts")))
    try:
        for site in gates.sites:
            shape = gates[site.kind, site.layer, site.block].shape
            assert scores[site.kind, site.layer, site.block].shape == shape
    finally:
        gates.detach()
