"""The options that training, auditing and showing share: which model, data and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from pliant.options import Flag, from_texts, named_values

if TYPE_CHECKING:
    from pliant.gradients.config import GradientConfig


@dataclass(frozen=True, kw_only=True)
class SelectiveOptions:
    model: str
    """nano-s, nano-l, a folder, or a name on the hub."""
    data: str
    """Text (.txt); rows with text, prompt and completion, or messages (.jsonl, ...); a hub data set
    (name:split); or nano: questions of the embedded models' world."""
    engine: str = "sparse"
    """How the selected tokens are trained: sparse, exact or completion."""
    ratio: float = 0.25
    """The share of each row's tokens that is trained."""
    selection: str | None = None
    """How tokens are selected: sampled, uniform, topk, all, ..."""
    score: str | None = None
    """What they are selected by: gradient, loss, entropy, margin, ..."""
    choose: Annotated[tuple[str, ...], Flag(metavar="NAME=VALUE")] = ()
    """Any other field of GradientConfig; repeatable."""
    length: Annotated[int, Ge(2)] = 256
    """The longest piece of text, in tokens."""
    rows: Annotated[int, Ge(1)] | None = None
    """Read only this many rows."""
    subset: str | None = None
    """The subset of a data set on the hub."""
    dtype: str = "float32"
    """The weights' type: float32, bfloat16, ..."""

    def config(self) -> GradientConfig:
        """The configuration that the options describe."""
        from pliant.gradients.config import GradientConfig

        return from_texts(
            GradientConfig,
            named_values(self.choose, "--choose"),
            "--choose",
            engine=None if self.engine == "auto" else self.engine,
            ratio=self.ratio,
            selection=self.selection,
            score=self.score,
        )
