"""The settings of a scorer: its rows, its outputs, the layer it reads, its LoRA."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pliant.errors import InvalidInput, check_choice, check_whole, named_settings

Aggregation = Literal["last", "mean", "max", "attention"]
Reads = Literal["probabilities", "classes", "numbers"]

SCORE, GAIN, RIGHT = "score", "gain", "right:"
"""P(hard); P(strong right) - P(weak right); `right:NAME`, P(the model of that name is right)."""


MOST_OUTPUTS = 100_000


@named_settings
@dataclass(frozen=True)
class CPXConfig:
    """Trainable: rows * d + d * outputs, plus outputs for a bias, d for attention, and the LoRA."""

    rows: int = 1
    """How many [CPX] positions follow a prompt."""
    outputs: tuple[str, ...] = ()
    """The name of each output: "score", "gain", "right:NAME" or your own; all but "gain" are logits
    of a probability. Default: "score", or `num_labels` outputs called label_0, ..."""
    num_labels: int | None = None
    """The number of outputs, if they are not named."""
    aggregation: Aggregation = "last"
    """How the hidden states of several rows are combined into one."""
    bias: bool = True
    """A bias in the head; a stock checkpoint exported without one needs no shifted threshold."""
    layer: int | None = None
    """Run and read this many layers; None reads the last."""
    lora_rank: int = 0
    """The rank of a LoRA that acts on [CPX] positions only; 0 is none."""
    lora_alpha: float | None = None
    """The LoRA's scale times its rank; None is twice the rank."""
    lora_targets: tuple[str, ...] = ()
    """Projections with the LoRA, by the ends of their names; empty means every one in the layers
    that sees all positions (a routed expert does not)."""
    reads: Reads = "probabilities"
    """What the outputs are: independent probabilities, exclusive classes, or numbers. Training sets
    it by its loss: bce, ce or regression."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "outputs", self._outputs())
        object.__setattr__(self, "num_labels", len(self.outputs))
        if isinstance(self.lora_targets, str):
            object.__setattr__(self, "lora_targets", (self.lora_targets,))
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        self._check()

    @classmethod
    def from_pretrained(cls, name: str | Path, **settings: Any) -> Self:
        """The settings of a saved scorer, or of a new one on this base, with those passed.

        `cpx_token` and `cpx_token_id` belong to the tokenizer and are accepted without effect. The
        base's own config, with the scorer's settings in it, is `CPXCausalLM.config`.
        """
        from pliant import loading
        from pliant.adapters import files, saving
        from pliant.complexity.saved import saved_scorer

        changes = {k: v for k, v in settings.items() if k not in ("cpx_token", "cpx_token_id")}
        if (folder := saved_scorer(name)) is None:
            loading.load_config(name)  # an error for what is no model
            return cls(**changes)
        saved: Self = saving.config_of(files.read(folder), cls)
        return replace(saved, **changes)

    @property
    def scale(self) -> float:
        """The factor of the LoRA's product."""
        if not self.lora_rank:
            return 0.0
        return (2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha) / (
            self.lora_rank
        )

    def _outputs(self) -> tuple[str, ...]:
        named = (self.outputs,) if isinstance(self.outputs, str) else tuple(self.outputs)
        count = self.num_labels
        if count is not None and (not isinstance(count, int) or not 1 <= count <= MOST_OUTPUTS):
            raise InvalidInput(f"num_labels = {count!r}: give 1 to {MOST_OUTPUTS:,}")
        if named and count not in (None, len(named)):
            raise InvalidInput(f"num_labels = {count}, and outputs names {len(named)}: give one")
        if named:
            return named
        if count in (None, 1):
            return (SCORE,)
        return tuple(f"label_{i}" for i in range(count))

    def _check(self) -> None:
        check_whole("rows", self.rows, least=1)
        check_whole("lora_rank", self.lora_rank, least=0)
        if self.layer is not None:
            check_whole("layer", self.layer, least=1)
        alpha = self.lora_alpha
        if alpha is not None and not (isinstance(alpha, (int, float)) and 0 < alpha < math.inf):
            raise InvalidInput(f"lora_alpha = {alpha!r}: give a number above 0, or None")
        check_choice("aggregation", self.aggregation, get_args(Aggregation))
        check_choice("reads", self.reads, get_args(Reads))
        name, times = Counter(self.outputs).most_common(1)[0]
        if times > 1 or not all(isinstance(o, str) and o for o in self.outputs):
            raise InvalidInput(
                f"outputs = {self.outputs!r}: {name!r} is repeated, or is not a name"
            )
