"""On every architecture whose cache can be split: training on stored prefixes is exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pliant.complexity import Complexity, CPXConfig, attach
from pliant.complexity.prefix_cache import disk
from pliant.complexity.prefix_cache.disk import open_files, write_files
from pliant.complexity.prefix_cache.store import PrefixStore, in_memory
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.prefill import Batch
from pliant.survey import Fp64Throughout, Specimen

LENGTHS = (9, 3, 12, 9, 5)
EXACT = 1e-12
"""Of gradients in fp64: a hundred times what rounding makes of them there, 1e-14 at most."""
CLOSE = 1e-5
"""Of keys and values in fp32, which other batches computed."""


@pytest.fixture
def scorer(quick: Specimen):
    """Two rows and a LoRA, all of it away from its initial values."""
    if quick.dtype != torch.float32:
        pytest.skip("tested in fp32")
    yield from _attached(quick)


@pytest.fixture
def exact_scorer(quick: Specimen):
    """The same on the model in fp64, where rounding cannot hide a fault."""
    if quick.dtype != torch.float32:
        pytest.skip("tested in fp64")
    for scorer in _attached(quick.in_fp64):
        with Fp64Throughout():
            yield scorer.double()


def _attached(specimen: Specimen) -> Iterator[Complexity]:
    grads = [p.requires_grad for p in specimen.model.parameters()]
    model = specimen.model.requires_grad_(False)
    try:
        scorer = attach(model, CPXConfig(rows=2, lora_rank=2))
    except InvalidInput:  # projections of a kind of its own: it takes no LoRA unless named
        scorer = attach(model, CPXConfig(rows=2))
    generator = torch.Generator().manual_seed(3)
    for p in scorer.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
        p.requires_grad_(True)
    yield scorer
    scorer.detach()
    for p, grad in zip(specimen.model.parameters(), grads, strict=True):
        p.requires_grad_(grad)


def test_gradients_on_stored_prefixes_are_a_full_forwards(exact_scorer: Complexity) -> None:
    ids = prompts()
    stored = remembered(exact_scorer, ids)
    order = [4, 0, 2]
    ours = gradients(
        exact_scorer, exact_scorer.logits_of(stored.batch(order).to_prefilled(exact_scorer))
    )
    full = gradients(exact_scorer, full_forward(exact_scorer, [ids[i] for i in order]))
    scale = max(t.abs().max().item() for t in full.values())
    assert scale > 0
    for name, gradient in full.items():
        assert gradient.dtype == torch.float64
        assert (ours[name] - gradient).abs().max() <= EXACT * max(1.0, scale), name


def test_files_hold_what_memory_holds(
    scorer: Complexity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "TOKENS", 12)  # so that there are several
    ids = prompts()
    stored = remembered(scorer, ids)
    write_files(tmp_path, scorer.prefilled, ids)
    mapped = open_files(tmp_path, ids)
    assert len(mapped.chunks) > 2
    assert mapped.bytes == stored.bytes
    for order in ([1, 3], [2], [0, 4, 1, 2, 3]):
        one, other = stored.batch(order), mapped.batch(order)
        assert one.lengths == other.lengths == tuple(LENGTHS[i] for i in order)
        for ours, theirs in zip(one.split(), other.split(), strict=True):
            assert ours.layers == theirs.layers
            for a, b in zip(ours.tensors, theirs.tensors, strict=True):  # other batches ran them
                assert torch.allclose(a, b, atol=CLOSE)


def remembered(scorer: Complexity, ids: list[Tensor]) -> PrefixStore:
    try:
        return in_memory(scorer.prefilled, ids)
    except UnsupportedModel as error:
        pytest.skip(f"its cache cannot be split: {error}")


def full_forward(scorer: Complexity, ids: list[Tensor]) -> Tensor:
    """Each prompt alone, rows and prompt in one forward, without any cache."""
    return torch.cat([scorer.logits_at_once(Batch.of([row])) for row in ids])


def gradients(scorer: Complexity, logits: Tensor) -> dict[str, Tensor]:
    scorer.zero_grad()
    torch.nn.functional.softplus(logits).sum().backward()
    return {name: p.grad.clone() for name, p in scorer.named_parameters() if p.grad is not None}


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 100, (length,), generator=generator) for length in LENGTHS]
