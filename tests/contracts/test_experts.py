"""On every architecture: z = 1 is invisible, z trains alone, and what is merged comes off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.contracts.conftest import specimen
from tests.contracts.page import PAGE
from torch import Tensor

from pliant.errors import WrongBase
from pliant.experts import SVFConfig
from pliant.experts.model import svf_layers
from pliant.survey import Specimen
from pliant.survey.experts import scatter

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@contextmanager
def expert(own: Specimen, scattered: bool = True, **options: Any) -> Iterator[PeftModel]:
    """The frozen model with an expert on every projection, z around 1 unless told otherwise."""
    own.model.requires_grad_(False)  # a convolution rounds otherwise if its weight is not
    model = get_peft_model(own.model, SVFConfig(**options)).eval()
    if scattered:
        scatter(model)
    try:
        yield model
    finally:
        model.unload()
        own.model.requires_grad_(True)


@contextmanager
def frozen(own: Specimen) -> Iterator[Tensor]:
    own.model.requires_grad_(False)
    try:
        yield own.run()
    finally:
        own.model.requires_grad_(True)


def bits(logits: Tensor) -> Tensor:
    return logits.contiguous().view(torch.uint8)


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= CLOSE[a.dtype] * float(b.abs().max())


@pytest.mark.parametrize("form", ["delta", "folded"])
def test_z_at_one_changes_no_bit(quick: Specimen, form: str) -> None:
    with frozen(quick) as plain, expert(quick, scattered=False, form=form):
        assert torch.equal(bits(quick.run()), bits(plain))


def test_an_expert_comes_off_without_a_trace(quick: Specimen) -> None:
    keys = list(quick.model.state_dict())
    modules = [type(module) for module in quick.model.modules()]
    with frozen(quick) as plain:
        with expert(quick) as model:
            assert not torch.equal(quick.run(), plain)
            with model.disable_adapter():
                assert torch.equal(bits(quick.run()), bits(plain))
        assert torch.equal(bits(quick.run()), bits(plain))
    assert list(quick.model.state_dict()) == keys
    assert [type(module) for module in quick.model.modules()] == modules


def test_merging_is_exact_and_leaves_no_drift(quick: Specimen) -> None:
    before = {name: p.clone() for name, p in quick.model.named_parameters()}
    with expert(quick) as model:
        unmerged = quick.run()
        for _ in range(3):
            model.merge_adapter()
            merged = quick.run()
            model.unmerge_adapter()
    assert close(merged, unmerged)
    for name, parameter in quick.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_disabled_while_merged_it_is_the_base(quick: Specimen) -> None:
    with frozen(quick) as plain, expert(quick) as model:
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(bits(quick.run()), bits(plain))


def test_what_is_saved_is_z_and_loads_to_the_same_bits(quick: Specimen, tmp_path: Path) -> None:
    with expert(quick, form="delta") as model:
        saved = quick.run()
        model.save_pretrained(tmp_path)
        numbers = sum(p.numel() for n, p in model.named_parameters() if "svf_z" in n)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(name.endswith("svf_z.weight") for name in tensors)
    # Modules that share a weight share z, which the file holds for each.
    assert numbers <= sum(tensor.numel() for tensor in tensors.values()) <= 4 * numbers
    again = PeftModel.from_pretrained(quick.model, tmp_path)
    try:
        assert torch.equal(quick.run(), saved)
    finally:
        again.unload().requires_grad_(True)


def test_the_wrong_base_is_refused(tmp_path: Path) -> None:
    first = specimen("llama")
    with expert(first) as model:
        model.save_pretrained(tmp_path)
    other = Specimen("llama")
    with torch.no_grad():
        other.model.model.layers[1].mlp.down_proj.weight.add_(1)
    with pytest.raises(WrongBase, match="trained on another base.*down_proj"):
        PeftModel.from_pretrained(other.model, tmp_path)
    assert not list(svf_layers(other.model))


@pytest.mark.parametrize("change", ["rounded", "one row"])
def test_other_singular_vectors_are_refused(tmp_path: Path, change: str) -> None:
    """Weights that were rounded, or changed in few places, have the fingerprint of their base."""
    with expert(specimen("llama")) as model:
        model.save_pretrained(tmp_path)
    other = Specimen("llama")
    if change == "rounded":
        other.model.to(torch.bfloat16)
    else:
        with torch.no_grad():
            other.model.model.layers[1].mlp.down_proj.weight[0] += 1
    with pytest.raises(WrongBase, match="same dtype"):
        PeftModel.from_pretrained(other.model, tmp_path)
    assert not list(svf_layers(other.model))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_invisible_as_without(quick: Specimen, side: str) -> None:
    with expert(quick):
        moved, bare = _moved(quick, side), quick.model
        assert bare is quick.model
    with frozen(quick):
        without = _moved(quick, side)
    assert moved <= max(10 * without, {torch.float32: 1e-4, torch.bfloat16: 0.2}[quick.dtype])


def _moved(own: Specimen, side: str) -> float:
    """How far padding moves the logits, relative to their size."""
    ids, pad = own.ids, torch.full_like(own.ids[:, :3], 7)
    mask = torch.ones_like(ids)
    parts = [pad, ids] if side == "left" else [ids, pad]
    masks = [torch.zeros_like(pad), mask] if side == "left" else [mask, torch.zeros_like(pad)]
    logits = own.run(torch.cat(parts, 1), attention_mask=torch.cat(masks, 1))
    own_part = logits[:, 3:] if side == "left" else logits[:, :-3]
    plain = own.run()
    return float((own_part - plain).abs().max() / plain.abs().max())


@pytest.mark.parametrize(
    ("column", "least"),
    [("singular values", 182), ("z gradients", 179), ("expert cache", 177), ("expert rows", 178)],
)
def test_the_reach_is_as_promised(column: str, least: int) -> None:
    """test_page.py measures every type again."""
    assert PAGE.count(column) >= least
