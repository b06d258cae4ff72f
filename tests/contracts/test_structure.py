"""On every architecture: gates at 1 are invisible, at 0 they remove, in between they train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.conftest import specimen
from tests.contracts.page import PAGE
from tests.minimal_adapter import anatomy_of, same_anatomy
from torch import Tensor

from pliant.errors import UnsupportedModel
from pliant.structure import GateConfig, Gates, attach, sites_of
from pliant.structure.config import KINDS, Kind
from pliant.survey import Specimen


def kinds_of(specimen: Specimen) -> tuple[Kind, ...]:
    kinds = []
    for kind in KINDS:
        try:
            kinds += [kind] if sites_of(specimen.anatomy, [kind]) else []
        except UnsupportedModel:
            continue
    return tuple(kinds)


@contextmanager
def gated(specimen: Specimen, *kinds: Kind, **options: object) -> Iterator[Gates]:
    kinds = kinds or kinds_of(specimen)
    if not kinds:
        pytest.skip("no unit is known")
    gates = attach(specimen.model, GateConfig(kinds, **options))  # type: ignore[arg-type]
    try:
        yield gates
    finally:
        gates.detach()


def scatter(gates: Gates, seed: int = 0) -> Gates:
    """Every gate somewhere in [0.5, 1.5]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in gates.parameters():
            gate.copy_(torch.rand(gate.shape, generator=generator) + 0.5)
    return gates


def bits(logits: Tensor) -> Tensor:
    return logits.contiguous().view(torch.uint8)


def test_gates_at_one_change_no_bit(quick: Specimen) -> None:
    with gated(quick):
        assert torch.equal(bits(quick.run()), bits(quick.logits))


def test_gates_act_and_come_off_without_a_trace(quick: Specimen) -> None:
    before, keys = anatomy_of(quick.model), list(quick.model.state_dict())
    with gated(quick) as gates:
        scatter(gates)
        assert list(quick.model.state_dict()) == keys
        assert not torch.equal(quick.run(), quick.logits)
        with gates.disabled():
            assert torch.equal(bits(quick.run()), bits(quick.logits))
    assert same_anatomy(anatomy_of(quick.model), before)
    assert torch.equal(bits(quick.run()), bits(quick.logits))


@pytest.mark.parametrize(
    ("column", "least"),
    [
        ("head gates", 175),
        ("mlp", 146),
        ("mlp gates", 176),
        ("layer gates", 183),
        ("gate gradients", 182),
        ("gated cache", 177),
        ("fewer heads", 100),
        ("fewer channels", 120),
        ("fewer layers", 158),
    ],
)
def test_the_reach_is_as_promised(column: str, least: int) -> None:
    """test_page.py measures every type again."""
    assert PAGE.count(column) >= least


def test_a_layer_at_zero_passes_its_input_on(quick: Specimen) -> None:
    with gated(quick, "layers") as gates, torch.no_grad():
        site = gates.sites[0]
        gates["layers", site.layer].zero_()
        passed: list[tuple[Tensor, Tensor]] = []

        def record(_: Any, args: Any, kwargs: Any, out: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            passed.append((before, out if isinstance(out, Tensor) else out[0]))

        handle = site.module.register_forward_hook(record, with_kwargs=True)
        quick.run()
        handle.remove()
    (before, after) = passed[0]
    assert torch.equal(before.to(after.dtype), after)


def test_gates_keep_causality(quick: Specimen) -> None:
    other = quick.ids.clone()
    other[:, -1] = (other[:, -1] + 7) % 90 + 5
    with gated(quick) as gates:
        scatter(gates)
        ours, theirs = quick.run(), quick.run(other)
    tolerance = 1e-4 if quick.dtype == torch.float32 else 0.1
    assert torch.allclose(ours[:, :-1], theirs[:, :-1], atol=tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gates_are_indifferent_to_padding(quick: Specimen, side: str) -> None:
    if not PAGE.says(str(quick.of), "left padding"):
        pytest.skip("the base's answers depend on padding")
    ids = quick.ids[:1]
    pads = torch.full((1, 3), 4)
    order = [pads, ids] if side == "left" else [ids, pads]
    mask = torch.cat([torch.zeros_like(p) if p is pads else torch.ones_like(p) for p in order], 1)
    inputs = {"attention_mask": mask}
    if side == "left":
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with gated(quick) as gates:
        scatter(gates)
        padded = quick.run(torch.cat(order, 1), **inputs)
        alone = quick.run(ids)
    own = padded[:, 3:] if side == "left" else padded[:, :-3]
    tolerance = 1e-4 if quick.dtype == torch.float32 else 0.2
    assert torch.allclose(own, alone, atol=tolerance)


def test_each_row_may_have_a_pattern_of_its_own(quick: Specimen) -> None:
    with gated(quick, patterns=("a", "b")) as gates:
        scatter(gates)
        expected = []
        for row, name in enumerate(("b", "a")):
            gates.use(name)
            expected.append(quick.run()[row])
        with gates.rows(["b", "a"]):
            together = quick.run()
        gates.use("a")
        assert not torch.allclose(quick.run()[0], expected[0], atol=1e-3)
    tolerance = 1e-5 if quick.dtype == torch.float32 else 0.05
    assert torch.allclose(together, torch.stack(expected), atol=tolerance)


@pytest.mark.parametrize("name", ["xlnet", "deepseek_v4", "hy_v4"])
def test_rows_that_cannot_be_told_apart_are_refused(name: str) -> None:
    own = specimen(name)
    with (
        gated(own, "layers", patterns=("a", "b")) as gates,
        gates.rows(["b", "a"]),
        pytest.raises(UnsupportedModel, match="cannot be told apart"),
    ):
        own.run()


def test_saved_and_loaded_gates_agree(quick: Specimen, tmp_path: Path) -> None:
    with gated(quick, patterns=("a", "b")) as gates:
        scatter(gates)
        expected = quick.run()
        gates.save_pretrained(tmp_path)
    again = Gates.from_pretrained(quick.model, tmp_path)
    try:
        assert torch.equal(quick.run(), expected)
    finally:
        again.detach()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2"])
def test_a_compiled_model_runs_in_one_graph_and_sees_edits(name: str) -> None:
    own = specimen(name)
    with gated(own) as gates, torch.no_grad():
        compiled = torch.compile(own.model, fullgraph=True, backend="eager")
        inputs = {"input_ids": own.ids, "use_cache": False}
        assert torch.allclose(compiled(**inputs).logits, own.logits, atol=1e-5)
        gates["heads", 0][0] = 0
        assert torch.allclose(compiled(**inputs).logits, own.run(), atol=1e-5)
        assert not torch.allclose(own.run(), own.logits, atol=1e-5)
    torch.compiler.reset()
