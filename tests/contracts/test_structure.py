"""On every architecture: gates at 1 are invisible, at 0 they remove, in between they train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.conftest import DTYPES, specimen
from tests.contracts.page import PAGE
from tests.minimal_adapter import anatomy_of, same_anatomy
from torch import Tensor

from pliant.errors import UnsupportedModel
from pliant.structure import GateConfig, Gates, attach, sites_of
from pliant.structure.config import KINDS, Kind
from pliant.structure.units import Site
from pliant.survey import Specimen


def kinds_of(specimen: Specimen, among: tuple[Kind, ...] = KINDS) -> tuple[Kind, ...]:
    kinds = []
    for kind in among:
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
        ("head gates", 178),
        ("mlp", 146),
        ("mlp gates", 179),
        ("other gates", 183),
        ("gated padding", 183),
        ("agency", 168),
        ("blocks", 177),
        ("layer gates", 183),
        ("gate gradients", 182),
        ("gated cache", 177),
        ("fewer heads", 100),
        ("fewer channels", 120),
        ("fewer experts", 55),
        ("fewer layers", 158),
    ],
)
def test_the_reach_is_as_promised(column: str, least: int) -> None:
    """test_page.py measures every type again."""
    assert PAGE.count(column) >= least


@pytest.mark.parametrize(("kind", "least"), [("expert_channels", 59), ("recurrent_heads", 23)])
def test_so_many_types_have_units_of_other_kinds(kind: str, least: int) -> None:
    column = PAGE.columns.index("other gates")
    notes = [
        PAGE.reasons.get(notes[column] or 0, "")
        for name, notes in PAGE.notes.items()
        if "+" not in name and PAGE.rows[name][column]
    ]
    assert sum(kind in note for note in notes) >= least


def test_agency_is_observed_or_says_why_not() -> None:
    """Wherever heads have gates: a state that changes the model would say another thing."""
    column, gated_ = PAGE.columns.index("agency"), PAGE.columns.index("head gates")
    for name, cells in PAGE.rows.items():
        if cells[gated_] and not cells[column]:
            note = PAGE.notes[name][column]
            assert note is not None
            assert "returns no attention weights" in PAGE.reasons[note], name


def test_every_model_with_an_mlp_has_gates_in_it() -> None:
    """The others are Mamba's, which have none, XLM, whose layers are no stack, and DeepSeek-V4,
    whose tiny copy sends every token to one expert."""
    without = {n for n in PAGE.rows if PAGE.says(n, "runs") and not PAGE.says(n, "mlp gates")}
    assert without <= {"falcon_mamba", "mamba", "mamba2", "xlm", "deepseek_v4"}


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
    of_rows = tuple(kind for kind in KINDS if kind != "expert_channels")
    with gated(quick, *kinds_of(quick, of_rows), patterns=("a", "b")) as gates:
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


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mixtral", "expert_channels"), ("jetmoe", "heads"), ("dbrx", "expert_channels")],
)
def test_weights_that_all_rows_share_have_one_pattern(name: str, kind: Kind) -> None:
    own = specimen(name)
    with (
        gated(own, kind, patterns=("a", "b")) as gates,
        gates.rows(["b", "a"]),
        pytest.raises(UnsupportedModel, match="which all rows share"),
    ):
        own.run()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("jetmoe", "heads"),
        ("xlnet", "heads"),
        ("deepseek_v4", "heads"),
        ("cpmant", "heads"),
        ("mixtral", "expert_channels"),
        ("llama4_text", "expert_channels"),
        ("gpt_oss", "expert_channels"),
        ("jetmoe", "expert_channels"),
        ("dbrx", "expert_channels"),
        ("longcat_flash", "expert_channels"),
        ("mamba", "recurrent_heads"),
        ("mamba2", "recurrent_heads"),
        ("qwen3_next", "recurrent_heads"),
        ("rwkv", "recurrent_heads"),
        ("minimax", "recurrent_heads"),
        ("kimi_linear", "recurrent_heads"),
    ],
)
def test_units_of_every_shape_obey_the_laws(name: str, kind: Kind, dtype: torch.dtype) -> None:
    """At 1 no bit changes, at 0 the slice of the weight is gone, bitwise; and there is a gradient.
    With half a model's units closed, so that no other path could hide one."""
    if name == "xlnet" and dtype == torch.bfloat16:
        pytest.skip("the model itself does not run in bf16")
    own = specimen(name, dtype)
    assert own.logits.isfinite().all()  # RWKV rescales its weights in its first run
    parts, kinds = anatomy_of(own.model), [type(m) for m in own.model.modules()]
    with gated(own, kind) as gates:
        assert torch.equal(bits(own.run()), bits(own.logits))
        loss = own.model(input_ids=own.ids, use_cache=False).logits.float().logsumexp(-1).sum()
        gradients = torch.autograd.grad(loss, list(gates.parameters()), allow_unused=True)
        assert any(g is not None and bool(g.any()) for g in gradients)
        closed = {}
        with torch.no_grad():
            for n, site in enumerate(gates.sites):
                generator = torch.Generator().manual_seed(n)
                closed[site.key] = torch.rand(site.count, generator=generator) < 0.5
                gates[kind, site.layer, site.block][closed[site.key]] = 0
        ours = own.run()
        sites = gates.sites
    assert same_anatomy(anatomy_of(own.model), parts)
    assert [type(m) for m in own.model.modules()] == kinds
    assert not torch.equal(ours, own.logits)
    with weights_zeroed(sites, closed):
        assert torch.equal(ours, own.run())


@contextmanager
def weights_zeroed(sites: list[Site], closed: dict[str, Tensor]) -> Iterator[None]:
    """The units' slices of the weights that read them, found by their axes, not by gates."""
    saved = []
    for site in sites:
        if site.slices is not None:
            weight = getattr(site.slices.holder, site.slices.parameter)
            axes = site.slices.axes
            view = weight.data.view(site.slices.view).movedim(axes, tuple(range(len(axes))))
            gone = closed[site.key].view(view.shape[: len(axes)])
        else:
            weight = site.module.weight
            view = weight.data.movedim(site.axis, 0)
            gone = closed[site.key].repeat_interleave(site.width)
        saved.append((weight, weight.data.clone()))
        view[gone] = 0
    try:
        yield
    finally:
        for weight, before in saved:
            weight.data.copy_(before)


def test_a_mixer_that_skips_its_projection_is_refused() -> None:
    """As Mamba's fused kernels do while training: a hook before the projection never runs."""
    own = specimen("mamba2")
    projection: Any = own.anatomy.recurrent(0)[0].output
    kind = type(projection)
    with gated(own, "recurrent_heads"):
        own.run()
        projection.__class__ = type("Fused", (kind,), {"__call__": kind.forward})
        try:
            with pytest.raises(UnsupportedModel, match="kernel that includes its output"):
                own.run()
        finally:
            projection.__class__ = kind


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


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "mixtral", "mamba2", "xlnet"])
def test_a_compiled_model_runs_in_one_graph_and_sees_edits(name: str) -> None:
    own = specimen(name)
    with gated(own) as gates, torch.no_grad():
        compiled = torch.compile(own.model, fullgraph=True, backend="eager")
        inputs = {"input_ids": own.ids, "use_cache": False}
        assert torch.allclose(compiled(**inputs).logits, own.logits, atol=1e-5)
        for site in gates.sites:
            if site.kind in ("heads", "expert_channels", "recurrent_heads"):
                gates[site.kind, site.layer][: site.count // 2] = 0
        assert torch.allclose(compiled(**inputs).logits, own.run(), atol=1e-5)
        assert not torch.allclose(own.run(), own.logits, atol=1e-5)
    torch.compiler.reset()
