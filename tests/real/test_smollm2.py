"""The laws on a real model: `make real` fetches SmolLM2-135M and runs these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.real.texts import EASY, HARD

from pliant import loading
from pliant.adapters import fingerprint
from pliant.complexity import Complexity, CPXConfig, attach, fit
from pliant.gradients import GradientConfig
from pliant.gradients import attach as attach_gradients

pytestmark = pytest.mark.real
NAME = "smollm2-135m"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, tokenizer = loading.load(NAME, dtype="float32")
    return model.requires_grad_(False), tokenizer


def chat(tokenizer: Any, text: str) -> torch.Tensor:
    ids: torch.Tensor = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    return ids


def test_it_is_dense_and_known_by_its_name(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    print_ = fingerprint(model)
    assert (print_.name, print_.level, print_.grid) == (NAME, "values", "fp32")
    assert model.num_parameters() == 134_515_008


def test_it_answers_in_english(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = chat(tokenizer, "What is the capital of France?")
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])


def test_an_idle_scorer_changes_no_bit_and_a_score_no_token(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = chat(tokenizer, EASY[0])
    with torch.no_grad():
        before = model(ids).logits
        scorer = attach(model, CPXConfig(), tokenizer)
        assert torch.equal(model(ids).logits, before)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16)
    scored = scorer.generate(ids, max_new_tokens=16)
    assert torch.equal(scored.outputs[0], plain) and not scored.prefilled_again
    scorer.detach()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_a_scorer_learns_is_saved_and_exports(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """To tell one kind of question from another, on questions that it has not seen."""
    model, tokenizer = loaded
    scorer = attach(model, CPXConfig(layer=20), tokenizer)
    fit(scorer, EASY[:8] + HARD[:8], [0.0] * 8 + [1.0] * 8, num_epochs=12, batch_size=8)
    scores = scorer.score(EASY[8:] + HARD[8:]).score
    easy, hard = scores[: len(EASY) - 8], scores[len(EASY) - 8 :]
    assert easy.max() < hard.min()
    scorer.save_pretrained(tmp_path / "scorer")
    result = scorer.export(tmp_path / "stock")
    assert result.difference <= result.bound
    scorer.detach()
    again = Complexity.from_pretrained(model, tmp_path / "scorer", tokenizer=tokenizer)
    assert abs(again.score(EASY[8:] + HARD[8:]).score - scores).max() < 1e-6
    again.detach()


def test_the_exact_engine_has_the_gradient_of_the_selected_tokens() -> None:
    model, tokenizer = loading.load(NAME, dtype="float32")
    model.train()
    ids = tokenizer("\n".join(EASY + HARD), return_tensors="pt").input_ids[:, :128]
    model(input_ids=ids, labels=ids).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    for engine in ("exact", "sparse"):
        model.zero_grad()
        gradients = attach_gradients(model, GradientConfig(ratio=1.0, engine=engine))
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.detach()
        for name, p in model.named_parameters():
            gap = (p.grad - wanted[name]).norm() / wanted[name].norm()
            assert gap < 1e-4, f"{engine}: {name}"
