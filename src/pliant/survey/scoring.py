"""What a scorer can do with a model: score on its cache, while it generates, early, and learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pliant.complexity import Complexity, CPXConfig, attach
from pliant.prefill import Batch, Prefilled, prefill
from pliant.survey.caching import pad_token
from pliant.survey.capability import YES, Verdict, register, yes_if
from pliant.survey.specimen import Specimen

LENGTHS = (13, 20, 15)
"""Longer than a tiny model's window."""
NEW_TOKENS = 3
CLOSE = 1e-4
"""Cached and uncached steps sum in another order."""

_plain: WeakKeyDictionary[Specimen, tuple[Tensor, ...]] = WeakKeyDictionary()
"""What each generates without a scorer: more than one question needs it."""


@register(
    "complexity",
    "scores",
    "In a padded batch, on a cache and at once: does a prompt score as alone in one forward?",
    needs=["layers"],
)
@torch.no_grad()
def scores(specimen: Specimen) -> Verdict:
    with _scorer(specimen, rows=2, aggregation="mean") as scorer:
        if not torch.equal(specimen.run(), specimen.logits):
            return Verdict(False, "attached and not asked, it changes the logits")
        on_right = _padded_on_the_right(_prompts())
        on_cache = scorer.logits_of(prefill(scorer.anatomy, *on_right, head=False))
        alone = _alone(scorer, _prompts())
        asked = torch.as_tensor(scorer.score(_prompts()).logits).to(alone)
        return _near(torch.stack([on_cache, asked]), torch.stack([alone, alone]))


@register(
    "complexity",
    "score + generate",
    "Scored on the way, does it generate the very logits that it does without?",
    needs=["scores"],
)
def score_and_generate(specimen: Specimen) -> Verdict:
    return _generates(specimen, layer=None)


@register(
    "complexity",
    "early exit",
    "Scored half-way and resumed, does it generate the very logits that it does without?",
    needs=["scores", "first k", "resume"],
)
def early_exit(specimen: Specimen) -> Verdict:
    return _generates(specimen, layer=max(1, len(specimen.anatomy.layers) // 2))


@register(
    "complexity",
    "learns",
    "Is the rows' gradient, on a cache, that of one forward over prompt and rows?",
    needs=["scores"],
)
def learns(specimen: Specimen) -> Verdict:
    batch = Batch.of(_prompts()[:1])
    with _scorer(specimen, rows=2, aggregation="mean") as scorer:
        logits = scorer.logits(batch.ids_BT)
        (on_cache,) = torch.autograd.grad(logits.sum(), scorer.rows)
        (at_once,) = torch.autograd.grad(scorer.logits_at_once(batch).sum(), scorer.rows)
        if not on_cache.any():
            return Verdict(False, "no gradient reaches the rows")
        return _near(on_cache / at_once.norm(), at_once / at_once.norm())


@register(
    "complexity",
    "row LoRA",
    "Can a LoRA act on the rows alone, on a cache as in one forward?",
    needs=["scores"],
)
@torch.no_grad()
def row_lora(specimen: Specimen) -> Verdict:
    with _scorer(specimen, rows=2, lora_rank=2) as scorer:
        on_cache = scorer.logits_of(prefill(scorer.anatomy, _same_length(), head=False))
        at_once = _alone(scorer, _same_length().tolist())
        for lora in scorer.lora.children():
            lora.b.zero_()  # type: ignore[operator]
        if torch.equal(_alone(scorer, _same_length().tolist()), at_once):
            return Verdict(False, "it has no effect")
        return _near(on_cache, at_once)


@register(
    "complexity",
    "prefixes",
    "Can each prompt's keys and values be kept alone, and joined to other batches?",
    needs=["scores"],
)
@torch.no_grad()
def prefixes(specimen: Specimen) -> Verdict:
    with _scorer(specimen, rows=2) as scorer:
        kept = prefill(scorer.anatomy, *_padded_on_the_right(_prompts()), head=False).split()
        joined = Prefilled.join(scorer.anatomy, [kept[2], kept[0]])
        alone = _alone(scorer, [_prompts()[2], _prompts()[0]])
        return _near(scorer.logits_of(joined), alone)


def _generates(specimen: Specimen, layer: int | None) -> Verdict:
    options: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "pad_token_id": pad_token(specimen),
    }
    ids = _same_length()
    every = torch.ones_like(ids)  # said, for some of the ids may be the model's padding
    if specimen not in _plain:
        found = specimen.model.generate(ids, attention_mask=every, **options)
        _plain[specimen] = found.logits
    with _scorer(specimen, layer=layer) as scorer:
        found = scorer.generate(ids, attention_mask=every, **options)
        alone = _alone(scorer, ids.tolist())
    pairs = zip(found.outputs[0].logits, _plain[specimen], strict=True)
    if not all(torch.equal(ours.nan_to_num(), theirs.nan_to_num()) for ours, theirs in pairs):
        return Verdict(False, "scored on the way, it generates other logits")
    verdict = _near(torch.as_tensor(found.scores.logits, dtype=alone.dtype), alone)
    note = "the prompts are run twice" if found.prefilled_again else ""
    return Verdict(True, note) if verdict.ok else verdict


@contextmanager
def _scorer(specimen: Specimen, **settings: Any) -> Iterator[Complexity]:
    """A scorer that has an opinion, for as long as it is needed."""
    scorer = attach(specimen.model, CPXConfig(outputs=("score", "gain"), **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in scorer.named_parameters():
            if name != "rows":
                spread = 0.05 if name.startswith("lora") else 0.3
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    try:
        yield scorer
    finally:
        scorer.detach()


@torch.no_grad()
def _alone(scorer: Complexity, prompts: Sequence[list[int]]) -> Tensor:
    """Each prompt for itself, in one forward without a cache."""
    return torch.cat([scorer.logits_at_once(Batch.of([prompt])) for prompt in prompts])


def _prompts() -> list[list[int]]:
    """Ordinary tokens: special ones sit at both ends of a tiny vocabulary."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 100, (n,), generator=generator).tolist() for n in LENGTHS]


def _same_length() -> Tensor:
    return torch.tensor([prompt[: min(LENGTHS)] for prompt in _prompts()[:2]])


def _padded_on_the_right(prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in prompts])
    return ids, mask


def _near(ours: Tensor, theirs: Tensor) -> Verdict:
    if not ours.isfinite().all():
        return Verdict(False, "its scores are not finite")
    if torch.allclose(ours, theirs, atol=CLOSE, rtol=CLOSE):
        return YES
    return yes_if(False, "on the cache it comes to something else")
