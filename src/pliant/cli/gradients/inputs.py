"""What training, auditing and showing share: a model, its data, and which tokens are selected."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from pliant.cli import terminal
from pliant.cli.shared_options import RowOptions, Selection, TokenScore
from pliant.cli.training_text import check_template, encode, read_data
from pliant.loading.dtypes import Dtype
from pliant.options import Flag, from_texts, named_values

if TYPE_CHECKING:
    from pliant.gradients.config import GradientConfig

QUESTIONS = 400


@dataclass(frozen=True, kw_only=True)
class SelectiveOptions(RowOptions):
    model: str
    """nano-s, nano-l, a folder, or a name on the hub."""
    data: str
    """Text (.txt); rows with text, prompt and completion, or messages, of Alpaca or ShareGPT
    (.jsonl, ...); a hub data set (name:split); or nano: questions of the embedded models' world."""
    engine: str = "sparse"
    """How the selected tokens are trained: sparse, exact or completion."""
    ratio: float = 0.25
    """The share of each row's tokens that is trained."""
    selection: Selection = "sampled"
    """How tokens are selected."""
    score: TokenScore = "gradient"
    """What they are selected by."""
    choose: Annotated[tuple[str, ...], Flag(metavar="NAME=VALUE")] = ()
    """Any other field of GradientConfig, as mix=0.5; repeatable. Default: its own values."""
    length: Annotated[int, Ge(2)] = 256
    """The longest piece of text, in tokens."""
    dtype: Dtype = "float32"
    """The weights' type."""

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


@dataclass(frozen=True)
class Inputs:
    """A model, its tokenizer, and the data in pieces of ids and labels, shuffled."""

    model: Any
    tokenizer: Any
    pieces: list[dict[str, list[int]]]

    def batches(self, size: int, count: int) -> list[dict[str, Any]]:
        from pliant.data.collate import Collator

        padded = Collator.of(self.tokenizer)
        starts = range(0, min(len(self.pieces), size * count), size)
        return [padded(self.pieces[start : start + size]) for start in starts]


def load_inputs(options: SelectiveOptions, device: str | None, seed: int) -> Inputs:
    """Read the data, which can fail at once, then load the model and cut the data into pieces."""
    from pliant.loading import load

    rows = read_data(options.data, "dev", QUESTIONS, options)
    check_template(rows, options.model)
    model, tokenizer = load(options.model, dtype=options.dtype, device=device)
    pieces = encode(rows, model, tokenizer, options.length).pieces
    random.Random(seed).shuffle(pieces)
    return Inputs(model, tokenizer, pieces)


@contextmanager
def quiet_libraries(*kinds: type[Warning]) -> Iterator[None]:
    """Print our own warnings, and those of `kinds`, as one line each; none of the libraries'."""
    from pliant.gradients import GradientsWarning
    from pliant.loading.dtypes import SlowDtypeWarning

    terminal.hide_loading_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", GradientsWarning)
        warnings.simplefilter("default", SlowDtypeWarning)
        for kind in kinds:
            warnings.simplefilter("always", kind)
        warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        yield
