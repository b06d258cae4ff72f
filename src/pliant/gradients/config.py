"""What a user may set of selective training: which tokens, by which score, through which engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from pliant.errors import InvalidInput, check_choice, check_whole, named_settings

Engine = Literal["sparse", "exact", "completion"]
Selection = Literal[
    "sampled", "uniform", "topk", "stratified", "sequence_aware", "fixed_quota", "all"
]
Score = Literal["gradient", "loss", "entropy", "margin", "combined", "doubt"]
KvGrad = Literal["detach", "one_hop", "full"]


@named_settings
@dataclass(frozen=True)
class GradientConfig:
    """How much is trained, and how that is chosen; nothing here changes what the model computes."""

    RETIRED: ClassVar = {"refresh": 1}
    """Settings of earlier versions, with the only value that files may still have."""

    engine: Engine = "sparse"
    """"sparse" runs only the chosen positions backward; "exact" the whole backbone, but the head
    only on chosen rows; "completion" the prompt without gradient and all of the completion."""
    ratio: float = 0.25
    """The share of a row's labelled tokens that is trained: ceil(ratio * tokens) of each row."""
    selection: Selection = "sampled"
    """How they are chosen. "sampled" and "uniform" weigh each by how likely it was to be chosen, so
    that the loss stays that of all tokens, on average; the others train another loss."""
    score: Score = "gradient"
    """What makes a token worth choosing; "uniform" and "all" need none."""
    kv_grad: KvGrad = "detach"
    """How far the gradient of "sparse" goes into the keys and values of positions that were not
    chosen: nowhere, into the projections that made them, or all the way (which is "exact")."""
    mix: float = 0.2
    """The share of "sampled" that is spread evenly: no weight exceeds 1 / (mix * ratio).
    benchmarks/gradient_quality.py: .2 is above .5 where a model is sure of most tokens."""
    score_share: float = 0.125
    """The share of the vocabulary that "sampled" tells the scores "gradient" and "loss" from, 1,024
    words at least; 1 reads all of it. An estimate moves what is drawn, never what is expected."""
    exit_layer: int | None = None
    """Score from the hidden states after this many layers; None scores from the last."""
    warmup_steps: int = 0
    """Steps over which the ratio falls from 1 to `ratio`."""
    dense_first: int = 0
    """Steps at the start that train every token, before the warm-up. benchmarks/gradient_race.py
    --dense: where these or `dense_every` help, standard training is better still."""
    dense_every: int = 0
    """Train every token on each step that is a multiple of this; 0 is never."""
    dynamic: bool = False
    """Move the ratio with the model's confidence: up while it is low, down when it is high."""
    sensitivity: float = 0.5
    """How far `dynamic` moves it."""
    num_strata: int = 4
    """The buckets of difficulty of "stratified"."""
    min_tokens_per_sequence: int = 1
    """What "sequence_aware" gives each row before the rest goes to the hardest of the batch."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, get_args(Engine))
        check_choice("selection", self.selection, get_args(Selection))
        check_choice("score", self.score, get_args(Score))
        check_choice("kv_grad", self.kv_grad, get_args(KvGrad))
        for name in ("ratio", "mix", "score_share"):
            _check_share(name, getattr(self, name))
        for name in ("warmup_steps", "dense_first", "dense_every", "min_tokens_per_sequence"):
            check_whole(name, getattr(self, name), 0)
        check_whole("num_strata", self.num_strata, 1)
        check_whole("seed", self.seed, 0)
        if self.exit_layer is not None:
            check_whole("exit_layer", self.exit_layer, 1)
        if not isinstance(self.dynamic, bool):
            raise InvalidInput(f"dynamic = {self.dynamic!r}: give True or False")
        number = isinstance(self.sensitivity, (int, float)) and math.isfinite(self.sensitivity)
        if not number or self.sensitivity < 0:
            raise InvalidInput(f"sensitivity = {self.sensitivity!r}: give 0 or more")

    @property
    def needs_scores(self) -> bool:
        """Whether the selection depends on scores."""
        return self.engine != "completion" and self.selection not in ("uniform", "all")


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise InvalidInput(f"{name} = {value!r}: give a share above 0, up to 1")
