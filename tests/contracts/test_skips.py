"""On every architecture: skips at 0 are invisible; trained, they act, hold in a cache, come off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.contracts.page import PAGE
from tests.minimal_adapter import anatomy_of, same_anatomy
from torch import Tensor

from pliant.structure.skips import Fusion, SkipConfig, Skips, attach
from pliant.survey import Specimen


@contextmanager
def skipped(specimen: Specimen, fusion: Fusion = "scale", train: bool = True) -> Iterator[Skips]:
    """The specimen with skips, away from 0 if they are to look trained."""
    skips = attach(specimen.model, SkipConfig(fusion))
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for layer in skips.pairs:
                scale = skips[layer]
                scale.add_(torch.randn(scale.shape, generator=generator) * 0.3 * train)
        yield skips
    finally:
        skips.detach()


def bits(logits: Tensor) -> Tensor:
    return logits.contiguous().view(torch.uint8)


def test_skips_at_zero_change_no_bit(every: Specimen) -> None:
    if every.of == "xlm":
        pytest.skip("its blocks are no stack of layers")
    expected = bits(every.logits)
    with skipped(every, train=False) as skips:
        assert torch.equal(bits(every.run()), expected)
        with torch.no_grad():
            for layer in skips.pairs:
                skips[layer].add_(0.5)
        # Skips that were never used would prove nothing. In mllama one layer of each pair reads
        # images alone, and is not run without them.
        assert torch.equal(every.run(), every.logits) == (every.of == "mllama")


@pytest.mark.parametrize("fusion", ["scale", "linear"])
def test_skips_at_zero_change_no_bit_in_bf16(quick: Specimen, fusion: Fusion) -> None:
    with skipped(quick, fusion, train=False):
        assert torch.equal(bits(quick.run()), bits(quick.logits))


@pytest.mark.parametrize("fusion", ["scale", "linear"])
def test_skips_act_and_come_off_without_a_trace(quick: Specimen, fusion: Fusion) -> None:
    before, keys = anatomy_of(quick.model), list(quick.model.state_dict())
    with skipped(quick, fusion) as skips:
        assert list(quick.model.state_dict()) == keys
        assert not torch.equal(quick.run(), quick.logits)
        with skips.disabled():
            assert torch.equal(bits(quick.run()), bits(quick.logits))
    assert same_anatomy(anatomy_of(quick.model), before)
    assert torch.equal(bits(quick.run()), bits(quick.logits))


def test_every_skip_has_a_gradient(quick: Specimen) -> None:
    with skipped(quick, train=False) as skips:
        scales = [skips[layer] for layer in skips.pairs]
        loss = quick.model(input_ids=quick.ids, use_cache=False).logits.float().logsumexp(-1).sum()
        for gradient in torch.autograd.grad(loss, scales):
            assert gradient.count_nonzero() > gradient.numel() / 2


def test_generation_with_the_cache_equals_without(quick: Specimen) -> None:
    if quick.dtype != torch.float32 or not PAGE.says(str(quick.of), "cached"):
        pytest.skip("in bf16, or in the base itself, the cache changes the logits")
    with skipped(quick):
        step = {"max_new_tokens": 3, "do_sample": False, "output_logits": True}
        step |= {"return_dict_in_generate": True, "min_new_tokens": 3}
        logits = [
            torch.stack(quick.model.generate(quick.ids, use_cache=cache, **step).logits)
            for cache in (True, False)
        ]
    assert torch.allclose(*logits, atol=2e-3)


def test_skips_keep_causality(quick: Specimen) -> None:
    other = quick.ids.clone()
    other[:, -1] = (other[:, -1] + 7) % 90 + 5
    with skipped(quick):
        ours, theirs = quick.run(), quick.run(other)
    tolerance = 1e-4 if quick.dtype == torch.float32 else 0.1
    assert torch.allclose(ours[:, :-1], theirs[:, :-1], atol=tolerance)


def test_saved_and_loaded_skips_agree(quick: Specimen, tmp_path: Path) -> None:
    with skipped(quick, "linear") as skips:
        expected = quick.run()
        skips.save_pretrained(tmp_path)
    again = Skips.from_pretrained(quick.model, tmp_path)
    try:
        assert again.name == "skips"
        assert torch.equal(quick.run(), expected)
    finally:
        again.detach()
