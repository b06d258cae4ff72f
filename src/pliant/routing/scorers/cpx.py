"""The [CPX] token as a router's scorer: it reads the base model's own prefill of the prompt.

Each of a few capacities is trained on a part of the labels, and the best on the others is then
trained on all. The base reads each prompt once for all of these trainings, and for the predictions
between them. benchmarks/routing_nano.py measures it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from pliant.routing.outcomes import Outcomes
from pliant.routing.prompts import Prompt, digest, text_of
from pliant.routing.scorers.base_model import BaseLM, ModelScorer
from pliant.routing.scorers.linear import Floats, best, folds, gain_error, together
from pliant.routing.scorers.protocol import (
    Folds,
    Groups,
    Partitions,
    Predictions,
    Prefilling,
    Prompts,
    State,
    TrainOn,
    gains,
    read_state,
)

if TYPE_CHECKING:
    from pliant.complexity import Complexity, Scores
    from pliant.complexity.prefix_cache.store import PrefixStore

_ADAPTER = "cpx"
"""The folder of the trained [CPX] adapter, inside the scorer's."""


@dataclass(frozen=True)
class Capacity:
    """How much a scorer can learn."""

    rows: int = 1
    lora_rank: int = 8
    layer: int | None = None
    """How many layers run before the rows are read; None runs all."""

    def __str__(self) -> str:
        layer = "" if self.layer is None else f", layer {self.layer}"
        return f"{self.rows} row{'s' * (self.rows > 1)}, LoRA rank {self.lora_rank}{layer}"


CAPACITIES = (Capacity(1, 0), Capacity(1, 4), Capacity(1, 8), Capacity(4, 8))


_CACHE_BYTES, _SAMPLE = 8e9, 8
"""The most bytes of keys and values in memory; how many of the longest prompts estimate them."""
_ROWS_A_BATCH = 64
_PARTS = 5
"""Of the fold that capacities are compared on."""
_ROWS_FOR_CHOICE = 8_000
"""How many training rows the candidates are trained on, at most."""


class Cpx(ModelScorer):
    """Predicts for each model the probability that it is right; the gain is the difference."""

    kind = "cpx"

    def __init__(
        self,
        base: BaseLM | str | None = None,
        capacities: Sequence[Capacity] = CAPACITIES,
        epochs: int = 6,
    ) -> None:
        super().__init__(base)
        self.capacities = tuple(capacities)
        # Chosen on development questions of the nano world.
        self.training: dict[str, Any] = {
            "num_epochs": epochs,
            "batch_size": 32,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
        }
        self.capacity = self.capacities[-1]
        self.errors: dict[str, float] = {}
        """The mean squared error of the gain on held-out labels, for each candidate."""
        self.models: tuple[str, ...] = ()
        self.scorer: Complexity | None = None
        self._cache = _PrefixCache(self)

    def cross_validate(
        self, outcomes: Outcomes, partitions: Partitions, seed: int = 0
    ) -> Predictions:
        """Each prompt as a fit on the other folds predicts it.

        To save trainings, capacities are compared on the first fold of the first partition, and the
        best is then trained for its other folds; further partitions are left out. In that fold
        each part is predicted by the capacity that is best on the rest of it. The prompts' keys
        and values stay in memory for the next `fit`.
        """
        self._cache.read(outcomes.asked)
        self.models = outcomes.models
        right = np.zeros_like(outcomes.right)
        first, *others = partitions[0]
        held, tried = outcomes.select(first), []
        rest = np.setdiff1d(np.arange(len(outcomes)), first)
        few = np.random.default_rng(seed).permutation(rest)[:_ROWS_FOR_CHOICE]
        for capacity in self.capacities:
            self._train(outcomes.select(few), capacity, seed)
            predictions = self._predict_read(held.asked)
            self.errors[str(capacity)] = gain_error(predictions.gain, held)
            assert predictions.right is not None
            tried.append(predictions.right)
        self.capacity = min(self.capacities, key=lambda capacity: self.errors[str(capacity)])
        right[first] = by_the_best_elsewhere(tried, held, seed)
        rest = np.concatenate(others)
        right[rest] = self._by_folds(outcomes, others, outcomes.select, seed)[rest]
        return Predictions(right, gains(right))

    def out_of_fold(
        self, outcomes: Outcomes, partitions: Partitions, train_on: TrainOn, seed: int = 0
    ) -> Predictions:
        """As every scorer's, of the first partition alone."""
        self._cache.read(outcomes.asked)
        right = self._by_folds(outcomes, partitions[0], train_on, seed)
        return Predictions(right, gains(right))

    def _by_folds(self, outcomes: Outcomes, folds: Folds, train_on: TrainOn, seed: int) -> Floats:
        """(n, m) the rows of each fold by a training on all others; 0 for rows in no fold."""
        right = np.zeros_like(outcomes.right)
        for fold in folds:
            rest = np.setdiff1d(np.arange(len(outcomes)), fold)
            self._train(train_on(rest), self.capacity, seed)
            predictions = self._predict_read(outcomes.select(fold).asked)
            assert predictions.right is not None
            right[fold] = predictions.right
        return right

    def fit(self, train: Outcomes, choice: Outcomes | None = None, seed: int = 0) -> Self:
        everything = together(train, choice)
        self._cache.read(everything.asked)
        self.models = everything.models
        try:
            if choice is not None and len(self.capacities) > 1:
                self._choose(train, choice, seed)
            self._train(everything, self.capacity, seed)
        finally:
            self._cache = _PrefixCache(self)
        return self

    def _choose(self, train: Outcomes, choice: Outcomes, seed: int) -> None:
        """The capacity that, trained on `train`, is best on `choice`."""
        few = train.select(np.arange(min(len(train), _ROWS_FOR_CHOICE)))

        def error(capacity: Capacity) -> float:
            self._train(few, capacity, seed)
            return gain_error(self._predict_read(choice.asked).gain, choice)

        self.capacity, self.errors = best(self.capacities, error)

    def predict(self, prompts: Prompts, groups: Groups = None) -> Predictions:
        assert self.scorer is not None, "not fitted"
        return _predictions(self.scorer.score(self.base.chat_format(prompts)))

    def _predict_read(self, prompts: Prompts) -> Predictions:
        """The same for prompts that were read, from their keys and values if these are stored."""
        assert self.scorer is not None, "not fitted"
        prefixes = self._cache.of(prompts)
        if prefixes is None:
            return self.predict(prompts)
        return _predictions(self.scorer.scores(_logits(self.scorer, prefixes)))

    def while_answering(self, prompt: Prompt) -> Prefilling:
        """Predict in the prefill of the base model's own answer to one prompt."""
        assert self.scorer is not None, "not fitted"
        return Prefilling(self.scorer, _predictions)

    def chosen(self) -> dict[str, Any]:
        return {"base": self.base.name, "capacity": str(self.capacity)}

    def state(self) -> State:
        capacity = asdict(self.capacity)
        return State({"base": self.base.name, "capacity": capacity, "models": list(self.models)})

    def load_state(self, state: State) -> None:
        self._base = self._base or state.settings["base"]
        self.capacity = Capacity(**state.settings["capacity"])
        self.models = tuple(state.settings["models"])

    def save(self, folder: Path) -> None:
        assert self.scorer is not None, "not fitted"
        shutil.rmtree(folder / _ADAPTER, ignore_errors=True)
        self.scorer.save_pretrained(folder / _ADAPTER)
        super().save(folder)

    @classmethod
    def load(cls, folder: Path, base: BaseLM | str | None = None) -> Self:
        from pliant.complexity import Complexity

        loaded = cls(base)
        loaded.load_state(read_state(folder, cls.kind))
        model, tokenizer = loaded.base.model, loaded.base.tokenizer
        loaded.scorer = Complexity.from_pretrained(
            model, folder / _ADAPTER, tokenizer=tokenizer, name=_unused_name(model)
        )
        return loaded

    def _train(self, outcomes: Outcomes, capacity: Capacity, seed: int) -> None:
        import torch

        from pliant.complexity import CPXConfig, attach
        from pliant.complexity.training.run import fit

        model, tokenizer = self.base.model, self.base.tokenizer
        if self.scorer is not None:
            self.scorer.detach()
        config = CPXConfig(
            rows=capacity.rows,
            outputs=tuple(f"right:{name}" for name in outcomes.models),
            aggregation="last" if capacity.rows == 1 else "mean",
            lora_rank=capacity.lora_rank,
            layer=capacity.layer,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.scorer = attach(model, config, tokenizer, name=_unused_name(model))
            prompts = self.base.chat_format(outcomes.asked)
            prefixes = self._cache.of(outcomes.asked)
            fit(self.scorer, prompts, outcomes.right, prefixes=prefixes, seed=seed, **self.training)


def by_the_best_elsewhere(tried: Sequence[Floats], outcomes: Outcomes, seed: int) -> Floats:
    """(n, m) of several predictions of the same rows, for each part of them those that are best on
    the other parts: what is chosen on the rows that it predicts looks better than it is."""
    right, rows = tried[0].copy(), np.arange(len(outcomes))
    for part in folds(outcomes, _PARTS, seed):
        rest = np.setdiff1d(rows, part)
        if len(rest):
            others = outcomes.select(rest)
            errors = [gain_error(gains(each[rest]), others) for each in tried]
            right[part] = tried[int(np.argmin(errors))][part]
    return right


class _PrefixCache:
    """The keys and values of the prompts that a fit uses, by the number of layers that they ran
    through; a prompt that is held is not run again."""

    def __init__(self, cpx: Cpx) -> None:
        self.cpx = cpx
        self.row: dict[str, int] = {}
        self.prompts: list[Prompt] = []
        self.prefixes: dict[int | None, PrefixStore | None] = {}

    def read(self, prompts: Prompts) -> None:
        """Hold these prompts as well; they are run when they are first used."""
        for prompt in prompts:
            if (key := digest(prompt)) not in self.row:
                self.row[key] = len(self.prompts)
                self.prompts.append(prompt)

    def of(self, prompts: Prompts) -> PrefixStore | None:
        """The prefixes of these prompts; None if those of all that are held exceed the memory."""
        scorer = self.cpx.scorer
        assert scorer is not None
        layer = scorer.config.layer
        held = self.prefixes.get(layer)
        new = self.prompts[0 if held is None else len(held) :]
        if new and (held is not None or layer not in self.prefixes):
            self.prefixes[layer] = self._extended(scorer, held, new)
        prefixes = self.prefixes[layer]
        return None if prefixes is None else prefixes.select([self.row[digest(p)] for p in prompts])

    def _extended(
        self, scorer: Complexity, held: PrefixStore | None, new: Prompts
    ) -> PrefixStore | None:
        from pliant.complexity.training.run import remember

        base, bytes_held = self.cpx.base, 0 if held is None else held.bytes
        order = sorted(range(len(new)), key=lambda i: -len(text_of(new[i])))
        read, unread = order[:_SAMPLE], order[_SAMPLE:]
        added = remember(scorer, base.chat_format([new[i] for i in read]))
        if bytes_held + added.bytes / len(read) * len(new) >= _CACHE_BYTES:
            return None
        if unread:
            added = added.joined(remember(scorer, base.chat_format([new[i] for i in unread])))
        added = added.select(np.argsort(order).tolist())
        return added if held is None else held.joined(added)


def _logits(scorer: Complexity, prefixes: PrefixStore) -> Floats:
    """(n, outputs), from stored prefixes, those of similar length together."""
    import torch

    prefixes = prefixes.with_capacity(scorer.config.rows)
    order = prefixes.position.argsort()
    logits = np.zeros((len(order), len(scorer.config.outputs)))
    with torch.inference_mode():
        for rows in order.split(_ROWS_A_BATCH):
            batch = prefixes.batch(rows)
            tensors = tuple(tensor.to(scorer.device) for tensor in batch.tensors)
            ran = replace(batch, tensors=tensors).to_prefilled(scorer)
            logits[rows.numpy()] = scorer.logits_of(ran).double().cpu().numpy()
    return logits


def _predictions(scores: Scores) -> Predictions:
    right: Floats = scores.values
    return Predictions(right, gains(right))


def _unused_name(model: Any) -> str:
    """A name that no adapter on the model has."""
    from pliant.adapters import attached

    names = attached(model)
    return next(name for i in range(1, len(names) + 2) if (name := f"cpx_{i}") not in names)
