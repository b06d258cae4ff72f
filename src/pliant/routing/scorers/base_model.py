"""Scorers that read a language model: the model that they share, and a linear probe on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Self

import numpy as np

from pliant.data import has_chat_template, ordinary_text
from pliant.errors import InvalidInput, WrongBase
from pliant.linear import Linear, logistic
from pliant.routing.backends.local import LocalModel, own_parameters
from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import messages, text_of
from pliant.routing.scorers.linear import Floats, best, gain_error, together
from pliant.routing.scorers.protocol import Groups, Predictions, Prompts, Scorer, State, gains


class BaseLM(LocalModel):
    """A causal language model by its name; a backend of that name uses the same copy."""

    def __init__(self, name: str, device: str | None = None) -> None:
        super().__init__(name, device=device)
        self.name = name

    def chat_format(self, prompts: Prompts) -> list[Any]:
        """The prompts as messages for a chat model, as plain text for any other."""
        if has_chat_template(self.tokenizer):
            return [messages(prompt) for prompt in prompts]
        return [ordinary_text(text_of(prompt), self.tokenizer) for prompt in prompts]

    def reading_flops(self, prompts: Prompts) -> float:
        """The mean cost of reading a prompt, estimated like the cost of an answer in labels."""
        from pliant.complexity.prompts import ids_of

        ids = ids_of(self.chat_format(prompts), self.tokenizer)
        return 2.0 * own_parameters(self.model) * sum(map(len, ids)) / max(1, len(ids))


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


_LAYERS = 4  # how many layers are tried at most, spread over the depth


class Probe(ModelScorer):
    """A logistic regression for each model on the base model's last hidden state, at one layer."""

    kind = "probe"
    strengths: ClassVar[tuple[float, ...]] = (0.1, 1.0, 10.0)
    mean: Floats
    std: Floats
    head: Linear

    def __init__(
        self, base: BaseLM | str | None = None, layers: Sequence[int] | None = None
    ) -> None:
        super().__init__(base)
        self.layers = layers
        """The candidates for the layer; None tries a few, spread over the depth."""
        self.layer = 0
        """How many layers run before the state is read; 0 before it is fitted."""
        self.strength = self.strengths[1]
        self.trained_on: dict[str, Any] | None = None
        """The fingerprint of the model that it read; None in older files."""
        self._checked = False

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        from pliant.adapters import fingerprint

        everything = together(train, choice)
        right, n = everything.right, len(train)
        layers = self._depths() if choice is not None else self._depths()[-1:]
        states = {k: last_states(self.base, everything.asked, k) for k in layers}

        def error(candidate: tuple[int, float]) -> float:
            layer, strength = candidate
            x = states[layer]
            self._solve(x[:n], right[:n], strength)
            assert choice is not None
            return gain_error(gains(self._read(x[n:])), choice)

        candidates = [(layer, strength) for layer in layers for strength in self.strengths]
        self.layer = layers[-1]
        if choice is not None:
            (self.layer, self.strength), _ = best(candidates, error)
        self._solve(states[self.layer], right, self.strength)
        self.trained_on, self._checked = asdict(fingerprint(self.base.model)), True
        return self

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        self._check_base()
        right = self._read(last_states(self.base, prompts, self.layer))
        return Predictions(right, gains(right))

    def chosen(self) -> dict[str, Any]:
        return {"base": self.base.name, "layer": self.layer, "strength": self.strength}

    def state(self) -> State:
        arrays = {name: array.astype(np.float32) for name, array in self.head.arrays().items()}
        settings = {**self.chosen(), "fingerprint": self.trained_on}
        return State(settings, {**arrays, "mean": self.mean, "std": self.std})

    def load_state(self, state: State) -> None:
        self._base = self._base or state.settings["base"]
        self.layer = state.settings["layer"]
        self.strength = state.settings["strength"]
        self.trained_on = state.settings.get("fingerprint")
        self.mean, self.std = state.arrays["mean"], state.arrays["std"]
        self.head = Linear.from_arrays(state.arrays, logistic=True)

    def _check_base(self) -> None:
        """When it first reads its model, for loading a router loads no model."""
        from pliant.adapters import Fingerprint, fingerprint

        if self._checked or self.trained_on is None:
            return
        trained_on = Fingerprint(**self.trained_on)
        if differences := trained_on.differences(fingerprint(self.base.model)):
            raise WrongBase(
                f"{self.base.name}: the probe was fitted on another base ({trained_on.name or 'a'} "
                f"{trained_on.model}): {differences}. Name its own base, or fit it again"
            )
        self._checked = True

    def _solve(self, x: Floats, right: Floats, strength: float) -> None:
        self.mean, self.std = x.mean(axis=0), x.std(axis=0) + 1e-6
        self.head = logistic((x - self.mean) / self.std, right, strength)

    def _read(self, x: Floats) -> Floats:
        return self.head((x - self.mean) / self.std)

    def _depths(self) -> list[int]:
        from pliant.anatomy import Anatomy

        if self.layers is not None:
            return sorted(self.layers)
        depth = len(Anatomy.of(self.base.model).layers)
        return sorted({round(depth * (i + 1) / _LAYERS) or 1 for i in range(_LAYERS)})


def last_states(base: BaseLM, prompts: Prompts, layer: int) -> Floats:
    """(n, D): each prompt's last token after `layer` layers and the final norm."""
    import torch

    from pliant.anatomy import Anatomy
    from pliant.complexity.prompts import ids_of
    from pliant.prefill import Batch, alike, prefill

    anatomy = Anatomy.of(base.model)
    depth = None if layer == len(anatomy.layers) else layer
    ids = ids_of(base.chat_format(prompts), base.tokenizer)
    states: Floats | None = None
    for rows in alike([len(prompt) for prompt in ids], None):
        batch = Batch.of([ids[row] for row in rows], device=base.model.device)
        with torch.inference_mode():
            ran = prefill(
                anatomy, batch.ids_BT, batch.mask_BT, layers=depth, head=False, resumable=False
            )
        assert ran.hidden is not None
        hidden = ran.hidden.double().cpu().numpy()
        states = np.zeros((len(ids), hidden.shape[1])) if states is None else states
        states[rows] = hidden
    return np.zeros((0, 0)) if states is None else states
