"""Room behind stored keys and values: the same bits as a copy, written once and never twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.minimal_adapter import tiny_llama, trained
from torch import Tensor

from pliant.anatomy.tiny import tiny_model
from pliant.complexity import Complexity, CPXConfig, attach
from pliant.complexity.prefix_cache.append_in_place import Appendable, Joined
from pliant.complexity.prefix_cache.store import PrefixStore, in_memory

LENGTHS = (7, 3, 11)


def scorer_on(model: Any) -> Complexity:
    return trained(attach(model.requires_grad_(False), CPXConfig(rows=2, aggregation="mean")))


def stored_by(scorer: Complexity) -> PrefixStore:
    ids = [torch.arange(5, 5 + length) for length in LENGTHS]
    return in_memory(scorer.prefilled, ids)


def logits_and_gradients(scorer: Complexity, prefilled: Any) -> list[Tensor]:
    logits = scorer.logits_of(prefilled)
    scorer.zero_grad()
    logits.sum().backward()
    return [logits.detach(), *(p.grad for p in scorer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("rows", [[0], [2, 0, 1]])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "gpt2", "deepseek_v3"])
def test_with_room_every_number_is_the_same(kind: str, rows: list[int]) -> None:
    scorer = scorer_on(tiny_model(kind))
    stored = stored_by(scorer)
    plain = logits_and_gradients(scorer, stored.batch(rows).to_prefilled(scorer))
    roomy = logits_and_gradients(scorer, stored.with_capacity(2).batch(rows).to_prefilled(scorer))
    for ours, theirs in zip(roomy, plain, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def nodes(of: Any) -> set[str]:
    """The names of all that a gradient goes through."""
    visited, ahead = set(), [of.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in visited:
            visited.add(node)
            ahead += [other for other, _ in node.next_functions]
    return {node.name() for node in visited}


@pytest.mark.parametrize("rows", [[0], [2, 0, 1]])
@pytest.mark.parametrize("heads", [4, 2])
def test_no_gradient_goes_to_the_prompt(heads: int, rows: list[int]) -> None:
    """(With fewer heads for keys, and a mask, transformers repeats the keys first.)"""
    scorer = scorer_on(tiny_llama(num_attention_heads=4, num_key_value_heads=heads))
    stored = stored_by(scorer)
    roomy = scorer.logits_of(stored.with_capacity(2).batch(rows).to_prefilled(scorer))
    assert ("_AttendedBackward" in nodes(roomy)) == (heads == 4)
    plain = logits_and_gradients(scorer, stored.batch(rows).to_prefilled(scorer))
    again = logits_and_gradients(scorer, stored.with_capacity(2).batch(rows).to_prefilled(scorer))
    for one, other in zip(again, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mask", ["none", "chosen", "added", "each head's"])
def test_the_gradient_of_attention_is_torchs(mask: str, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(3, 2, 9, 4, generator=generator) for _ in range(2)]
    new = [torch.randn(3, 2, 2, 4, generator=generator).requires_grad_() for _ in range(2)]
    query = torch.randn(3, 2 * groups, 2, 4, generator=generator).requires_grad_()
    shape = (3, 2 * groups if mask == "each head's" else 1, 2, 9)
    seen = torch.rand(shape, generator=generator) > 0.3
    seen[..., 0] = True
    added = torch.randn(shape, generator=generator)
    given = {"none": None, "chosen": seen}.get(mask, added)
    how: Any = {"attn_mask": given, "scale": 0.7, "enable_gqa": groups > 1}

    def gradients(joined: list[Tensor]) -> list[Tensor]:
        out = torch.nn.functional.scaled_dot_product_attention(query, *joined, **how)
        assert ("_AttendedBackward" in nodes(out)) == isinstance(joined[0], Joined)
        return list(torch.autograd.grad(out.square().sum(), [query, *new]))

    plain = [torch.cat([t[:, :, :7], n], dim=2) for t, n in zip(whole, new, strict=True)]
    roomy = [torch.cat([Appendable.of(t, 7), n], dim=2) for t, n in zip(whole, new, strict=True)]
    for ours, theirs in zip(gradients(roomy), gradients(plain), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_room_is_used_and_nothing_is_copied() -> None:
    scorer = scorer_on(tiny_llama())
    picked = stored_by(scorer).with_capacity(2).batch([2, 1])
    before = [t.clone() for t in picked.tensors]
    scorer.logits_of(picked.to_prefilled(scorer))
    longest = max(LENGTHS)
    for now, then in zip(picked.tensors, before, strict=True):
        assert torch.equal(now[:, :, :longest], then[:, :, :longest])
        assert not torch.equal(now[:, :, longest:], then[:, :, longest:])


def test_a_second_step_neither_reads_nor_disturbs_the_first() -> None:
    scorer = scorer_on(tiny_llama())
    prefilled = stored_by(scorer).with_capacity(2).batch([0, 1, 2]).to_prefilled(scorer)
    first = scorer.logits_of(prefilled)
    with torch.no_grad():
        scorer.rows.mul_(2)
        second = scorer.logits_of(prefilled)
        alone = scorer.logits_of(stored_by(scorer).batch([0, 1, 2]).to_prefilled(scorer))
        scorer.rows.div_(2)
    assert torch.allclose(second, alone, atol=1e-6) and not torch.allclose(first, second)
    ours = torch.autograd.grad(first.sum(), scorer.rows)[0]
    again = scorer.logits_of(stored_by(scorer).batch([0, 1, 2]).to_prefilled(scorer))
    assert torch.allclose(ours, torch.autograd.grad(again.sum(), scorer.rows)[0], atol=1e-6)


@pytest.mark.parametrize("new", [torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 1, 4).double()])
def test_what_does_not_fit_is_copied(new: Tensor) -> None:
    whole = torch.randn(1, 2, 7, 4)
    cached, before = Appendable.of(whole, 5), whole.clone()
    joined = torch.cat([cached, new], dim=-2)
    assert torch.equal(joined, torch.cat([before[:, :, :5], new], dim=-2))
    assert torch.equal(whole, before) and type(joined) is Tensor
