"""Scorers that read a language model: the model that they share, and a linear probe on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from pliant.data import has_chat_template, ordinary_text
from pliant.errors import InvalidInput
from pliant.routing.backends.local import LocalModel, own_parameters
from pliant.routing.prompts import messages, text_of
from pliant.routing.scorers.protocol import Prompts, Scorer, State, read_state
from pliant.routing.scorers.vectors import Reader, Vectors, VectorScorer

if TYPE_CHECKING:
    from pliant.anatomy import Anatomy


class BaseLM(LocalModel):
    """A causal language model by its name; a backend of that name uses the same copy."""

    def __init__(self, name: str, device: str | None = None) -> None:
        super().__init__(name, device=device)
        self.name, self.device = name, device

    def chat_format(self, prompts: Prompts) -> list[Any]:
        """The prompts as messages for a chat model, as plain text for any other."""
        if has_chat_template(self.tokenizer):
            return [messages(prompt) for prompt in prompts]
        return [ordinary_text(text_of(prompt), self.tokenizer) for prompt in prompts]

    def ids_of(self, prompts: Prompts) -> list[list[int]]:
        """The prompts' tokens, in the chat format."""
        from pliant.complexity.prompts import ids_of

        return ids_of(self.chat_format(prompts), self.tokenizer)

    def reading_flops(self, prompts: Prompts, layer: int | None = None) -> float:
        """The mean cost of reading a prompt, or of its first layers, estimated like the cost of an
        answer in labels."""
        ids, parameters = self.ids_of(prompts), own_parameters(self.model)
        if layer is not None:
            skipped = self.anatomy.layers[layer:]
            parameters -= sum(p.numel() for module in skipped for p in module.parameters())
        return 2.0 * parameters * sum(map(len, ids)) / max(1, len(ids))

    @property
    def anatomy(self) -> Anatomy:
        from pliant.anatomy import Anatomy

        return Anatomy.of(self.model)


class ModelScorer(Scorer):
    """A scorer that reads a base model, given by its name."""

    def __init__(self, base: BaseLM | str | None) -> None:
        self._base = base

    @property
    def base(self) -> BaseLM:
        """The model that it reads."""
        if self._base is None:
            raise InvalidInput(
                f"{self.kind} reads a model: name one, as in make({self.kind!r}, base='nano-s')"
            )
        if isinstance(self._base, str):
            self._base = BaseLM(self._base)
        return self._base

    def flops(self, prompts: Prompts) -> float:
        return self.base.reading_flops(prompts)

    @classmethod
    def load(cls, folder: Path, base: BaseLM | str | None = None) -> Self:
        """A saved scorer that reads `base`, or by default the model that it was saved with."""
        scorer = cls(base)
        scorer.load_state(read_state(folder, cls.kind))
        return scorer


class States(Reader):
    """The hidden states of a prompt in a base model, after each of a few layers and the final norm.

    One prefill reads all layers; `pooling` takes the last token's state, or the mean over all.
    """

    def __init__(
        self,
        base: BaseLM,
        pooling: Literal["last", "mean"],
        shares: Sequence[float] = (),
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.base, self.pooling, self.name = base, pooling, base.name
        self._shares, self._layers = shares, layers

    @property
    def model(self) -> Any:
        return self.base.model

    @property
    def layers(self) -> tuple[int, ...]:
        """As named, or these shares of the depth."""
        if self._layers is None:
            depth = len(self.base.anatomy.layers)
            self._layers = [round(depth * share) or 1 for share in self._shares]
        return tuple(sorted(set(self._layers)))

    def flops(self, prompts: Prompts, layer: int) -> float:
        return self.base.reading_flops(prompts, layer)

    def compute(self, prompts: Prompts, layers: Sequence[int]) -> Vectors:
        import torch

        from pliant.anatomy.several_depths import states_after
        from pliant.prefill import Batch, alike, supports_padding
        from pliant.prefill.forward import inputs_of

        anatomy, ids = self.base.anatomy, self.base.ids_of(prompts)
        states = np.zeros((len(ids), len(layers), anatomy.hidden_size), np.float32)
        for rows in alike([len(prompt) for prompt in ids], equal=not supports_padding(anatomy)):
            batch = Batch.of([ids[row] for row in rows], device=self.model.device)
            inputs = {**inputs_of(anatomy, batch), "use_cache": False}
            with torch.inference_mode():
                by_layer = states_after(anatomy, layers, **inputs)
            for at, layer in enumerate(layers):
                hidden_BTD = by_layer[layer].float()
                pooled = hidden_BTD[:, -1] if self.pooling == "last" else _mean(hidden_BTD, batch)
                states[rows, at] = pooled.cpu().numpy()
        return states


def _mean(hidden_BTD: Any, batch: Any) -> Any:
    """(B, D): over each prompt's own tokens."""
    mask_BT1 = batch.mask_BT[..., None].to(hidden_BTD)
    return (hidden_BTD * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1).clamp(min=1)


_QUARTERS = (0.25, 0.5, 0.75, 1.0)


class Probe(VectorScorer, ModelScorer):
    """A logistic regression for each model on the base model's last hidden state, at one layer."""

    kind = "probe"
    noun = "the probe"
    heads = ("logistic",)

    def __init__(
        self, base: BaseLM | str | None = None, layers: Sequence[int] | None = None
    ) -> None:
        VectorScorer.__init__(self)
        ModelScorer.__init__(self, base)
        self.layers = layers
        """The candidates for the layer; None tries a few, spread over the depth."""
        self._reader: States | None = None

    @property
    def reader(self) -> States:
        if self._reader is None or self._reader.base is not self.base:
            self._reader = States(self.base, "last", _QUARTERS, self.layers)
        return self._reader

    def chosen(self) -> dict[str, Any]:
        assert self.candidate is not None, "not fitted"
        layer, strength = self.candidate.layer, self.candidate.strength
        return {"base": self.base.name, "layer": layer, "strength": strength}

    def load_state(self, state: State) -> None:
        self._base = self._base or state.settings["base"]
        super().load_state(state)
