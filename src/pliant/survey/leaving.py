"""How what Pliant adds leaves a model: as a stock checkpoint, or not, and why."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pliant.complexity import CPXConfig, attach
from pliant.complexity.export import export
from pliant.errors import PliantError
from pliant.survey.capability import YES, Verdict, register
from pliant.survey.specimen import Specimen


@register(
    "complexity",
    "export",
    "Does a scorer leave as a stock classifier that says the same, whole and at half depth?",
    needs=["layers"],
)
def leaves(specimen: Specimen) -> Verdict:
    """At half depth it is a smaller model; where only that is impossible, the verdict says so."""
    if why := _why_not(specimen, layer=None):
        return Verdict(False, why)
    why = _why_not(specimen, layer=max(1, len(specimen.anatomy.layers) // 2))
    return Verdict(True, f"whole alone; at half depth, {why}") if why else YES


def _why_not(specimen: Specimen, layer: int | None) -> str:
    """Empty if it leaves; else the reason, in words that types have in common."""
    try:
        _leave(specimen, layer)
    except PliantError as error:
        reason = str(error).partition(":")[0].replace(type(specimen.model).__name__, "it")
        return re.sub(r"\w+ForSequenceClassification", "its sequence classifier", reason)
    return ""


def _leave(specimen: Specimen, layer: int | None) -> None:
    scorer = attach(specimen.model, CPXConfig(bias=False, layer=layer), name="leaving")
    try:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            scorer.head.weight.normal_(generator=generator)
        with tempfile.TemporaryDirectory() as folder:
            export(scorer, Path(folder) / "stock", _bytes(scorer.anatomy.embeddings))
    finally:
        scorer.detach()


def _bytes(embeddings: torch.nn.Module) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, as many as there are embeddings for: of the kind that most models have,
    for some types are loaded with the class of their own tokenizers, whatever was saved."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rows = min(len(alphabet), getattr(embeddings, "num_embeddings", len(alphabet)))
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet[:rows])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=alphabet[0])
