"""One interface for every way to choose experts: prompts in, a mixture for each out.

mixtures = strategy.adapt(prompts)       # [{"math": 1.0}, {}, ...]; {} is the base
answers = strategy.answer(prompts)       # each with its own mixture, in one batch
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pliant.experts.adapting.prompts import Prompt, experts_on, generate
from pliant.experts.rows import Mixture
from pliant.stats import as_json


@dataclass(frozen=True)
class Choice:
    """The mixture chosen for one prompt, and why."""

    mixture: Mixture
    """Expert -> coefficient, or a coefficient for each layer; {} is the base."""
    reason: str
    """Half a sentence for people."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """How probable each expert was, and `base`, where the strategy compares them."""

    @property
    def name(self) -> str:
        """`math`, `base`, or `0.5 math - 0.2 code`."""
        return name_of(self.mixture)

    def as_dict(self) -> dict[str, Any]:
        return {"expert": self.name, **as_json(self)}

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Answer:
    """An answer, and the mixture of experts that gave it."""

    text: str
    choice: Choice

    def as_dict(self) -> dict[str, Any]:
        return {"answer": self.text, **self.choice.as_dict()}

    def __str__(self) -> str:
        return f"{self.text} ({self.choice})"


def name_of(mixture: Mixture) -> str:
    """A mixture as people write it; of coefficients for each layer, their mean."""
    means = {
        name: float(a) if isinstance(a, int | float) else sum(a) / len(a)
        for name, a in mixture.items()
    }
    text = ""
    for name, mean in means.items():
        sign = ("-" if mean < 0 else "") if not text else (" - " if mean < 0 else " + ")
        size = "" if abs(mean) == 1 else f"{abs(mean):.3g} "
        text += f"{sign}{size}{name}"
    return text or "base"


class Strategy(ABC):
    """Chooses a mixture of the experts on `model` for each prompt."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.experts = experts_on(model)

    @abstractmethod
    def choose(self, prompts: Sequence[Prompt]) -> list[Choice]:
        """The mixture for each prompt, and the reason."""

    def adapt(self, prompts: Sequence[Prompt]) -> list[Mixture]:
        """The mixture for each prompt."""
        return [choice.mixture for choice in self.choose(prompts)]

    def answer(
        self, prompts: Sequence[Prompt], *, batch_size: int | None = None, **generation: Any
    ) -> list[Answer]:
        """The answer to each prompt by the mixture chosen for it; see `generate`."""
        choices = self.choose(prompts)
        mixtures = [choice.mixture for choice in choices]
        texts = generate(
            self.model, self.tokenizer, prompts, mixtures, batch_size=batch_size, **generation
        )
        return [Answer(text, choice) for text, choice in zip(texts, choices, strict=True)]
