"""The classifier: a linear head on the state of a prompt's last token, read in its own prefill.

    strategy = ByClassifier.fit(model, tokenizer, prompts, experts)     # "base" for none of them
    strategy.save_pretrained("classifier")
    answers = strategy.answer(["17 + 4?"])

The head has one output for each expert, and none for the base: what no expert is probable for, the
base answers. Where the experts leave the first layers alone and the head reads after those, an
answer needs no other forward than its own: the prompt's prefill stops at that layer for the choice,
and goes on with the chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from pliant import __version__
from pliant.adapters import Fingerprint, files, fingerprint
from pliant.anatomy import Anatomy
from pliant.anatomy.depth import run_first
from pliant.data import splits
from pliant.errors import (
    CorruptFile,
    InvalidInput,
    UnsupportedModel,
    WrongBase,
    did_you_mean,
    named_settings,
)
from pliant.experts.adapting.prompts import (
    Prompt,
    batches,
    encode,
    experts_on,
    first_expert_layer,
    generate_batch,
    key_of,
    longest_answer,
    without_experts,
)
from pliant.experts.adapting.strategy import Answer, Choice, Strategy
from pliant.experts.layer import EXPERTS
from pliant.experts.model import svf_layers, use_rows
from pliant.experts.rows import Rows
from pliant.linear import Linear, logistic
from pliant.prefill import Batch
from pliant.prefill.forward import inputs_of
from pliant.stats import Floats

BASE = "base"
"""What people call the model without an expert."""
KIND = "ByClassifier"
STRENGTHS = (0.1, 1.0, 10.0)
LAYERS = 4
"""How many layers are tried at most."""


@named_settings
@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """What the head reads, and when it trusts itself."""

    layer: int | None = None
    """How many layers run before the state is read; None chooses on held-out prompts."""
    strength: float | None = None
    """The inverse of the regularisation; None chooses on held-out prompts."""
    threshold: float = 0.5
    """An expert that is less probable leaves the prompt to the base."""
    held_out: float = 0.25
    """The share of the prompts that the choice is made on."""
    seed: int = 0
    """Of the held-out prompts."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise InvalidInput(f"threshold = {self.threshold}: give a probability in [0, 1]")
        if not 0 < self.held_out < 1:
            raise InvalidInput(f"held_out = {self.held_out}: give a share between 0 and 1")


@dataclass(frozen=True, eq=False)
class Head:
    """Probabilities from states, one for each expert."""

    experts: tuple[str, ...]
    layer: int
    mean: Floats
    std: Floats
    linear: Linear

    def __call__(self, states: Floats) -> Floats:
        """(n, experts)"""
        return self.linear((states - self.mean) / self.std)

    @classmethod
    def fit(cls, experts: Sequence[str], layer: int, states: Floats, own: Floats, c: float) -> Head:
        mean, std = states.mean(0), states.std(0) + 1e-6
        return cls(tuple(experts), layer, mean, std, logistic((states - mean) / std, own, c))


@dataclass(frozen=True)
class Fitted:
    """How a classifier did on the prompts that it was not fitted on."""

    accuracy: float
    """The share of them that went to the right expert, or rightly to the base."""
    prompts: int
    layer: int
    strength: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.accuracy:.1%} of {self.prompts} held-out prompts are classified right, by the "
            f"state after layer {self.layer}"
        )


class ByClassifier(Strategy):
    """Each prompt goes to its most probable expert, or to the base."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        head: Head,
        config: ClassifierConfig = ClassifierConfig(),
        fitted: Fitted | None = None,
    ) -> None:
        super().__init__(model, tokenizer)
        for name in head.experts:
            if name not in self.experts:
                raise InvalidInput(
                    f"the classifier names the expert {name!r}, which the model does not have"
                    f"{did_you_mean(name, self.experts)}"
                )
        self.head, self.config, self.fitted = head, config, fitted
        self.anatomy = Anatomy.of(model)

    @classmethod
    def fit(
        cls,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        experts: Sequence[str | None],
        config: ClassifierConfig = ClassifierConfig(),
    ) -> Self:
        """Learn which prompt needs which expert; None or `base` is none of them."""
        names = _names(experts, experts_on(model), len(prompts))
        own = np.array([[float(e == name) for name in names] for e in experts])
        keys = [key_of(prompt) for prompt in prompts]
        (held,) = splits(len(prompts), [config.held_out], config.seed, keys)
        rest = sorted(set(range(len(prompts))) - set(held))
        if not held or not rest:
            raise InvalidInput(f"{len(prompts)} prompts cannot be split: give more different ones")
        ids = encode(prompts, tokenizer)
        depths = [config.layer] if config.layer is not None else _depths(model)
        strengths = [config.strength] if config.strength is not None else STRENGTHS
        best: tuple[tuple[float, float], Fitted, Floats] | None = None
        for layer in depths:
            states = states_after(model, ids, layer)
            for c in strengths:
                head = Head.fit(names, layer, states[rest], own[rest], c)
                p = head(states[held])
                right = _right(p, own[held], config.threshold)
                error = float(np.mean((p - own[held]) ** 2))
                if best is None or (right, -error) > best[0]:
                    best = (right, -error), Fitted(right, len(held), layer, c), states
        assert best is not None
        _, fitted, states = best
        head = Head.fit(names, fitted.layer, states, own, fitted.strength)
        return cls(model, tokenizer, head, config, fitted)

    # --- choosing --------------------------------------------------------------------------------

    def choose(self, prompts: Sequence[Prompt]) -> list[Choice]:
        if not len(prompts):
            return []
        states = states_after(self.anatomy, encode(prompts, self.tokenizer), self.head.layer)
        return self._choices(states)

    def _choices(self, states: Floats) -> list[Choice]:
        return [self._choice(p) for p in self.head(states)]

    def _choice(self, p: Floats) -> Choice:
        top, limit = int(p.argmax()), self.config.threshold
        name = self.head.experts[top]
        scores = dict(zip(self.head.experts, map(float, p), strict=True))
        if p[top] < limit:
            reason = f"no expert is probable enough ({name} {p[top]:.2f}, below {limit:.2f})"
            return Choice({}, reason, scores)
        return Choice({name: 1.0}, f"the classifier gives it {p[top]:.2f}", scores)

    @property
    def shares_prefill(self) -> bool:
        """Whether the choice is made inside the prefill of the answer."""
        return self.head.layer <= first_expert_layer(self.model)

    def answer(
        self, prompts: Sequence[Prompt], *, batch_size: int | None = None, **generation: Any
    ) -> list[Answer]:
        """The answer to each prompt by its expert, without another forward if that is possible."""
        if not self.shares_prefill:
            return super().answer(prompts, batch_size=batch_size, **generation)
        answers: list[Answer | None] = [None] * len(prompts)
        ids, new = encode(prompts, self.tokenizer), longest_answer(generation)
        for rows, batch in batches(self.anatomy, ids, batch_size, new=new):
            choices: list[Choice] = []
            with self._choosing(len(rows), choices):
                texts = generate_batch(self.model, self.tokenizer, batch, **generation)
            for row, text, choice in zip(rows, texts, choices, strict=True):
                answers[row] = Answer(text, choice)
        return [answer for answer in answers if answer is not None]

    @contextmanager
    def _choosing(self, count: int, choices: list[Choice]) -> Iterator[None]:
        """The first forward in the block chooses where the experts begin, and goes on with them."""
        rows = Rows((), torch.zeros(1, 0))
        layer = self.anatomy.layers[self.head.layer]

        def choose(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hook.remove()
            hidden = args[0] if args else kwargs.get("hidden_states")
            copies = rows.batch[0] // count
            if not isinstance(hidden, Tensor) or hidden.shape[:2] != rows.batch:
                raise UnsupportedModel(
                    f"{type(module).__name__} gets no hidden state of each token, so the choice "
                    "cannot be made inside the prefill: use choose() and generate()"
                )
            choices.extend(self._choices(_array(hidden[::copies, -1])))
            chosen = Rows.of_mixtures([choice.mixture for choice in choices], self.experts)
            rows.names, rows.weights = chosen.names, chosen.weights
            for _, each in svf_layers(self.model):
                each.use_rows(rows)

        hook = layer.register_forward_pre_hook(choose, with_kwargs=True)
        try:
            with use_rows(self.anatomy, rows):
                yield
        finally:
            hook.remove()

    # --- files -----------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the head and the fingerprint of its base."""
        head = self.head
        arrays = {"mean": head.mean, "std": head.std, **head.linear.arrays()}
        tensors = {name: torch.from_numpy(np.asarray(a)).float() for name, a in arrays.items()}
        weights, name, digest = files.serialize(tensors)
        config = asdict(self.config)
        config |= {"experts": list(head.experts), "read_after": head.layer}
        state = {} if self.fitted is None else {"fitted": self.fitted.as_dict()}
        index = files.Index(
            format=files.FORMAT,
            pliant=__version__,
            part="experts",
            kind=KIND,
            config=config,
            state=state,
            weights=name,
            sha256=digest,
            base=fingerprint(self.model, ignore=EXPERTS),
        )
        files.write(Path(folder), index, weights, sum(t.numel() for t in tensors.values()))

    @classmethod
    def from_pretrained(cls, model: Any, tokenizer: Any, folder: str | Path) -> Self:
        """Read a classifier; another base than its own is refused."""
        saved = files.read(files.locate(folder))
        if saved.index.kind != KIND:
            raise CorruptFile(f"{folder}: holds a {saved.index.kind}, not a classifier of experts")
        check_base(saved.index.base, model, folder)
        for name, tensor in saved.tensors.items():
            files.check_finite(tensor, name, saved.folder)
        try:
            head, config, fitted = _of(saved)
        except (KeyError, ValueError) as error:
            raise CorruptFile(f"{folder}: not what Pliant writes ({error!r})") from error
        except TypeError as error:
            raise CorruptFile(
                f"{folder}: not what Pliant writes (a value of another type)"
            ) from error
        return cls(model, tokenizer, head, config, fitted)


def _of(saved: files.Saved) -> tuple[Head, ClassifierConfig, Fitted | None]:
    config = dict(saved.index.config)
    experts, layer = tuple(config.pop("experts")), config.pop("read_after")
    arrays = {name: t.double().numpy() for name, t in saved.tensors.items()}
    linear = Linear.from_arrays(arrays, logistic=True)
    mean, std = arrays["mean"], arrays["std"]
    if mean.shape != std.shape or linear.weight.shape != (*mean.shape, len(experts)):
        raise ValueError(f"a mean of {mean.shape} beside a weight of {linear.weight.shape}")
    if not (std > 0).all():
        raise ValueError("a standard deviation that is not above 0")
    known = saved.index.state.get("fitted")
    fitted = None if known is None else Fitted(**known)
    return Head(experts, layer, mean, std, linear), ClassifierConfig(**config), fitted


def check_base(saved: Fingerprint, model: Any, folder: str | Path) -> None:
    if differences := saved.differences(fingerprint(model, ignore=EXPERTS)):
        raise WrongBase(
            f"{folder}: the classifier was fitted on another base ({saved.name or saved.model}): "
            f"{differences}. Fit it again on this one"
        )


def states_after(model: Any, ids: Sequence[Sequence[int]], layer: int) -> Floats:
    """(n, D): the base's state of each prompt's last token after so many layers, in one forward."""
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    states: dict[int, Floats] = {}
    with torch.no_grad(), without_experts(anatomy):
        for rows, batch in batches(anatomy, ids):
            states.update(zip(rows, _read(anatomy, layer, batch), strict=True))
    return np.stack([states[row] for row in range(len(ids))])


def _read(anatomy: Anatomy, layer: int, batch: Batch) -> Floats:
    inputs = {**inputs_of(anatomy, batch), "use_cache": False}
    return _array(run_first(anatomy, layer, resumable=False, **inputs).hidden[:, -1])


def _array(hidden: Tensor) -> Floats:
    array: Floats = hidden.detach().double().cpu().numpy()
    return array


def _depths(model: Any) -> list[int]:
    """Layers that cost nothing, if the experts leave some alone; else some all over the depth."""
    free = first_expert_layer(model)
    depth = free or len(Anatomy.of(model).layers)
    return sorted({round(depth * (i + 1) / LAYERS) or 1 for i in range(LAYERS)})


def _names(experts: Sequence[str | None], known: Sequence[str], prompts: int) -> tuple[str, ...]:
    if len(experts) != prompts:
        raise InvalidInput(f"{len(experts)} experts for {prompts} prompts: give one for each")
    own = {e for e in experts if e is not None and e != BASE}
    for name in sorted(own):
        if name not in known:
            raise InvalidInput(f"no expert {name!r}{did_you_mean(name, [*known, BASE])}")
    if not own:
        raise InvalidInput("no prompt needs an expert: there is nothing to classify")
    return tuple(name for name in known if name in own)


def _right(p: Floats, own: Floats, threshold: float) -> float:
    chosen = np.where(p.max(1) < threshold, -1, p.argmax(1))
    true = np.where(own.sum(1) == 0, -1, own.argmax(1))
    return float(np.mean(chosen == true))
