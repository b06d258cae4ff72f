"""On the contract architectures, in fp32 and bf16: a scorer changes nothing and misses nothing.

In fp32 the page's columns say as much of every type, and are measured again by test_page.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.contracts.page import PAGE
from tests.minimal_adapter import anatomy_of, same_anatomy, trained

from pliant.complexity import Complexity, CPXConfig, attach
from pliant.survey import Specimen

PROMPTS = [[7, 8, 9, 10, 11], list(range(20, 34)), [50, 51, 52]]
NEW: dict[str, Any] = {
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "do_sample": False,
    "pad_token_id": 0,
}


@pytest.fixture(params=["whole", "early"])
def scorer(quick: Specimen, request: pytest.FixtureRequest) -> Iterator[Complexity]:
    layer = None if request.param == "whole" else max(1, len(quick.anatomy.layers) // 2)
    scorer = trained(attach(quick.model, CPXConfig(rows=2, layer=layer)))
    yield scorer
    if scorer.name:
        scorer.detach()


def test_attached_asked_and_detached_the_base_is_as_it_was(quick: Specimen) -> None:
    before = quick.run()
    anatomy = anatomy_of(quick.model)
    scorer = trained(attach(quick.model, CPXConfig(rows=2, lora_rank=2)))
    assert torch.equal(quick.run(), before)
    scorer.score(PROMPTS)
    scorer.logits(torch.tensor(PROMPTS[:1])).sum().backward()
    quick.model.zero_grad(set_to_none=True)
    assert torch.equal(quick.run(), before)
    scorer.detach()
    assert same_anatomy(anatomy_of(quick.model), anatomy)


def test_scored_on_the_way_it_generates_the_bases_own_tokens(
    quick: Specimen, scorer: Complexity
) -> None:
    batch = torch.tensor([PROMPTS[1], PROMPTS[1][::-1]])
    plain = quick.model.generate(batch, attention_mask=torch.ones_like(batch), **NEW)
    output = scorer.generate(batch, **NEW)
    assert torch.equal(output.outputs[0], plain)
    assert not output.prefilled_again
    close = 1e-4 if quick.dtype == torch.float32 else 0.05
    assert output.scores.score == pytest.approx(scorer.score(batch.tolist()).score, abs=close)


def test_a_batch_scores_as_its_prompts_do_alone(quick: Specimen, scorer: Complexity) -> None:
    alone = np.concatenate([scorer.score([prompt]).score for prompt in PROMPTS])
    close = 1e-4 if quick.dtype == torch.float32 else 0.05
    assert scorer.score(PROMPTS).score == pytest.approx(alone, abs=close)


@pytest.mark.parametrize(
    ("column", "least"),
    [
        ("scores", 181),
        ("score + generate", 180),
        ("early exit", 179),
        ("learns", 181),
        ("row LoRA", 179),
        ("prefixes", 136),
    ],
)
def test_the_reach_is_as_promised(column: str, least: int) -> None:
    assert PAGE.count(column) >= least
