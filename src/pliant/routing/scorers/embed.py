"""A scorer on sentence embeddings: of any Hugging Face encoder, by default MiniLM (once fetched).

    make("embed")                                # MiniLM: pliant models get minilm
    make("embed", base="BAAI/bge-small-en-v1.5", heads=["ridge"])
    make("embed", base="smollm2-135m")           # a language model's own early states

A language model in place of an encoder is read as far as an early layer, and the states of the
prompt's tokens are averaged. Where it answers the prompt itself, it computes these anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from pliant import loading
from pliant.errors import InvalidInput, did_you_mean
from pliant.loading import catalogue
from pliant.routing.prompts import text_of
from pliant.routing.scorers import DEFAULT_ENCODER
from pliant.routing.scorers.base_model import BaseLM, States
from pliant.routing.scorers.protocol import Prompts, State, read_state
from pliant.routing.scorers.vectors import STRENGTHS, Reader, Vectors, VectorScorer

HEADS = ("ridge", "logistic", "knn")
EARLY = (0.125, 0.25, 0.5)
"""The layers of a language model that are tried, as shares of its depth."""
_TOKENS_A_BATCH = 2_048


class Embed(VectorScorer):
    """Ridge or logistic regression, or nearest neighbors, on an embedding of the prompt."""

    kind = "embed"
    noun = "embed"

    def __init__(
        self,
        base: Reader | BaseLM | str | None = None,
        heads: Sequence[str] = HEADS,
        layers: Sequence[int] | None = None,
        device: str | None = None,
    ) -> None:
        """`base` is an encoder or a language model, by its name; MiniLM if that was fetched.

        A reader (`reader_of`) that several scorers share remembers its prompts for all of them.
        """
        super().__init__()
        for head in heads:
            if head not in STRENGTHS:
                raise InvalidInput(f"heads: {head!r} is none{did_you_mean(head, STRENGTHS)}")
        self.heads, self._layers, self._device = tuple(heads), layers, device
        self._base = base
        self.owns_reader = not isinstance(base, Reader)

    @property
    def reader(self) -> Reader:
        if not isinstance(self._base, Reader):
            base = default_encoder() if self._base is None else self._base
            self._base = reader_of(base, self._layers, self._device)
        return self._base

    def chosen(self) -> dict[str, Any]:
        assert self.candidate is not None, "not fitted"
        return {"base": self.reader.name, **asdict(self.candidate)}

    def load_state(self, state: State) -> None:
        super().load_state(state)
        self._base = state.settings["base"] if self._base is None else self._base
        self._layers = (state.settings["layer"],)

    @classmethod
    def load(cls, folder: Path, base: Reader | BaseLM | str | None = None) -> Self:
        scorer = cls(base)
        scorer.load_state(read_state(folder, cls.kind))
        return scorer


def default_encoder() -> str:
    """The encoder to use where none is named; an error says how to get one."""
    if not catalogue.installed(DEFAULT_ENCODER):
        raise InvalidInput(
            f"embed reads a text encoder: fetch one (pliant models get {DEFAULT_ENCODER}), or name "
            "one, as in make('embed', base='FOLDER')"
        )
    return DEFAULT_ENCODER


def reader_of(
    base: BaseLM | str, layers: Sequence[int] | None = None, device: str | None = None
) -> Reader:
    """What reads prompts with this model: as an encoder, or as a language model."""
    name, device = (base, device) if isinstance(base, str) else (base.name, base.device)
    if loading.is_encoder(name):
        return Encoder(name, device)
    model = BaseLM(name, device) if isinstance(base, str) else base
    return States(model, "mean", EARLY, layers)


class Encoder(Reader):
    """Sentence embeddings of unit length, as sentence-transformers computes them."""

    def __init__(self, name: str, device: str | None = None) -> None:
        super().__init__()
        loading.resolve(name)  # so that an unknown name fails at once
        self.name, self.device = name, device

    @property
    def layers(self) -> tuple[int, ...]:
        return (0,)

    @property
    def model(self) -> Any:
        return self._loaded[0]

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return loading.load_encoder(self.name, device=self.device)

    @cached_property
    def pooling(self) -> str:
        """cls, mean or last: which of the tokens' states make the embedding."""
        modules = loading.read_json(self.name, "modules.json") or []
        paths = [str(module.get("path")) for module in modules if "Pooling" in str(module["type"])]
        config = loading.read_json(self.name, f"{paths[0]}/config.json") if paths else None
        for key, pooling in (("cls_token", "cls"), ("lasttoken", "last")):
            if (config or {}).get(f"pooling_mode_{key}"):
                return pooling
        return "mean"

    @cached_property
    def longest(self) -> int | None:
        """The most tokens that it reads of a prompt; None if nothing limits them."""
        own = loading.read_json(self.name, "sentence_bert_config.json") or {}
        limits = (
            own.get("max_seq_length"),
            getattr(self.model.config, "max_position_embeddings", None),
            self._loaded[1].model_max_length,
        )
        # A tokenizer without a limit has one of 1e30.
        return min((limit for limit in limits if limit and limit < 1e9), default=None)

    def flops(self, prompts: Prompts, layer: int = 0) -> float:
        tokens = sum(map(len, self._ids(prompts)))
        return 2.0 * self.model.num_parameters() * tokens / max(1, len(prompts))

    def compute(self, prompts: Prompts, layers: Sequence[int] = (0,)) -> Vectors:
        import torch

        from pliant.data.collate import pad_rows
        from pliant.prefill import alike

        model, tokenizer = self._loaded
        ids = self._ids(prompts)
        embeddings: dict[int, Vectors] = {}
        for rows in alike([len(each) for each in ids], tokens=_TOKENS_A_BATCH):
            # On the right whatever the tokenizer does: absolute positions count from the left.
            batch = pad_rows([ids[row] for row in rows], tokenizer.pad_token_id or 0)
            ids_BT, mask_BT = (tensor.to(model.device) for tensor in batch)
            with torch.inference_mode():
                hidden_BTD = model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
            pooled = _pooled(hidden_BTD, mask_BT, self.pooling)
            unit = torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()
            embeddings |= dict(zip(rows, unit, strict=True))
        return np.stack([embeddings[row] for row in range(len(ids))])[:, None]

    def _ids(self, prompts: Prompts) -> list[list[int]]:
        texts = [text_of(prompt) for prompt in prompts]
        limit = {"truncation": True, "max_length": self.longest} if self.longest else {}
        ids: list[list[int]] = self._loaded[1](texts, **limit)["input_ids"]
        return ids


def _pooled(hidden_BTD: Any, mask_BT: Any, pooling: str) -> Any:
    """(B, D), of rows that are padded on the right."""
    if pooling == "cls":
        return hidden_BTD[:, 0]
    if pooling == "last":
        last_B = mask_BT.sum(dim=1).clamp(min=1) - 1
        return hidden_BTD[range(len(last_B)), last_B]
    mask_BT1 = mask_BT[..., None].to(hidden_BTD)
    return (hidden_BTD * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1).clamp(min=1)
