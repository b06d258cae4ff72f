"""The catalogue's models are what it says: `make real` has fetched them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from pliant.loading import catalogue

pytestmark = pytest.mark.real


@pytest.mark.parametrize("name", [name for name in catalogue.CATALOGUE])
def test_every_file_is_the_one_that_was_recorded(name: str) -> None:
    if not catalogue.installed(name):
        pytest.skip(f"not fetched: pliant models get {name}")
    folder = catalogue.path(name)
    record = json.loads((folder / catalogue.RECORD).read_text())
    for file, digest in record["files"].items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest, file


@pytest.mark.parametrize("name", [name for name in catalogue.CATALOGUE])
def test_it_has_as_many_parameters_as_listed(name: str) -> None:
    if not catalogue.installed(name):
        pytest.skip(f"not fetched: pliant models get {name}")
    model: Any = AutoModel.from_pretrained(catalogue.path(name))
    assert model.num_parameters() == pytest.approx(catalogue.entry(name).parameters, rel=0.001)


def test_the_encoder_puts_alike_sentences_together() -> None:
    folder = catalogue.path("minilm")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    texts = ["A cat sat on the mat.", "A kitten rested on the rug.", "Shares fell in late trading."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    with torch.no_grad():
        x = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    x = torch.nn.functional.normalize(x, dim=1)
    assert x[0] @ x[1] > 0.5 > 0.2 > x[0] @ x[2]
