"""On every architecture whose cache can be taken apart: training on stored prefixes is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pliant.complexity import Complexity, CPXConfig, attach
from pliant.complexity.learning.learner import Learner
from pliant.complexity.stored import files as prefix_files
from pliant.complexity.stored.files import on_disk, opened
from pliant.complexity.stored.prefixes import Stored, in_memory
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.prefill import Batch
from pliant.survey import Specimen

LENGTHS = (9, 3, 12, 9, 5)
CLOSE = 1e-5


@pytest.fixture
def scorer(quick: Specimen):
    """Two rows and a LoRA, all of it away from where it starts; fp32 alone, for the bound is."""
    if quick.dtype != torch.float32:
        pytest.skip("the bound is fp32's")
    grads = [p.requires_grad for p in quick.model.parameters()]
    model = quick.model.requires_grad_(False)
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
    for p, grad in zip(quick.model.parameters(), grads, strict=True):
        p.requires_grad_(grad)


def test_gradients_on_stored_prefixes_are_a_full_forwards(scorer: Complexity) -> None:
    ids = prompts()
    stored = remembered(scorer, ids)
    order = [4, 0, 2]
    ours = gradients(scorer, scorer.logits_of(stored.pick(order).ready(scorer)))
    full = gradients(scorer, full_forward(scorer, [ids[i] for i in order]))
    scale = max(t.abs().max().item() for t in full.values())
    assert scale > 0
    for name, gradient in full.items():
        assert (ours[name] - gradient).abs().max() <= CLOSE * max(1.0, scale), name


def test_files_hold_what_memory_holds(
    scorer: Complexity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_files, "TOKENS", 12)  # so that there are several
    ids = prompts()
    stored = remembered(scorer, ids)
    on_disk(tmp_path, Learner(scorer).prefilled, ids)
    mapped = opened(tmp_path, ids)
    assert len(mapped.chunks) > 2
    assert mapped.bytes == stored.bytes
    for order in ([1, 3], [2], [0, 4, 1, 2, 3]):
        one, other = stored.pick(order), mapped.pick(order)
        assert one.lengths == other.lengths == tuple(LENGTHS[i] for i in order)
        for ours, theirs in zip(one.apart(), other.apart(), strict=True):
            assert ours.layers == theirs.layers
            for a, b in zip(ours.tensors, theirs.tensors, strict=True):  # other batches ran them
                assert torch.allclose(a, b, atol=CLOSE)


def remembered(scorer: Complexity, ids: list[Tensor]) -> Stored:
    try:
        return in_memory(Learner(scorer).prefilled, ids)
    except UnsupportedModel as error:
        pytest.skip(f"its cache cannot be taken apart: {error}")


def full_forward(scorer: Complexity, ids: list[Tensor]) -> Tensor:
    """Each prompt alone, rows and prompt in one forward, without any cache."""
    return torch.cat([scorer._logits_at_once(Batch.of([row])) for row in ids])


def gradients(scorer: Complexity, logits: Tensor) -> dict[str, Tensor]:
    scorer.zero_grad()
    torch.nn.functional.softplus(logits).sum().backward()
    return {name: p.grad.clone() for name, p in scorer.named_parameters() if p.grad is not None}


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 100, (length,), generator=generator) for length in LENGTHS]
