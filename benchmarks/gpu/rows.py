"""The rows of the GPU benchmark, the most valuable first, and the sizes at which each is run.

Add a row at the place that its value deserves: those at the end are the first that a short run
skips. A function of a row takes its settings, the device, and `keep(name, figures)`, which writes
what was measured at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

Keep = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Row:
    """One entry of `gpu.json`."""

    name: str
    function: str
    """module.function, in this package."""
    expected: float
    """Seconds: with less time left the row is skipped."""
    limit: float
    """Seconds after which it is stopped."""
    settings: dict[str, Any] = field(default_factory=dict)
    """A row that is there with the same settings is not run again."""

    def run(self, device: str, keep: Keep) -> None:
        self.load()(self.settings, device, keep)

    def load(self) -> Callable[[dict[str, Any], str, Keep], None]:
        """The function, and with it the libraries that it needs."""
        module, _, name = self.function.rpartition(".")
        function: Callable[[dict[str, Any], str, Keep], None]
        function = getattr(import_module(f"benchmarks.gpu.{module}"), name)
        return function

    @property
    def is_check(self) -> bool:
        """Whether it says right or wrong, and not how fast."""
        return self.function.startswith(("engines.", "scorer."))


LAYERS = {"backend": "inductor", "compiled": "layers"}
ENGINES = {"engines": ["sparse", "exact", "completion"]}
WHOLE = {"backend": "inductor", "compiled": "model", "engines": ["sparse", "exact"]}
SLOW = {"disable": False}
"""Tracing takes longer than all other rows of a dry run together, where it is disabled."""
FLASH = {"attention": "flash_attention_2"}
SMALL = {"geometry": "small", "dtype": "bfloat16", "batch": 4, "length": 256}
ONE = {"geometry": "1B", "dtype": "bfloat16"}
SEVEN = {"geometry": "7B", "dtype": "bfloat16"}
REAL = {"dtype": "bfloat16"}
STEP = {"batch": 4, "length": 1024, "rounds": 11}
SHORT_STEP = {"batch": 1, "length": 512, "rounds": 15}
SCORERS = {"scorers": ["one row", "four rows, LoRA"]}
BOTH = {"prompt": 1_000, "new": 64, "rounds": 7} | SCORERS
ONE_ROW = {"prompt": 1_000, "new": 64, "rounds": 5, "scorers": ["one row"]}
MANY = {"prompts": 32, "length": 1024, "batch": 8, "rounds": 3, "epochs": 20}
FEW = {"prompts": 16, "length": 1024, "batch": 2, "rounds": 2, "epochs": 8}
GRAPH = {"batch": 1, "length": 1_000}
REMOVAL = {"prompt": 1_024, "new": 32, "rounds": 9, "training": True}
EXPERTS = {"batch": 2, "length": 1_024, "new": 32, "rounds": 5, "training": True}
BIG_EXPERTS = EXPERTS | {"batch": 1, "rounds": 3}
BIG_REMOVAL = {"prompt": 1_024, "new": 32, "rounds": 5, "training": False}

FULL = (
    Row("engines in bf16", "engines.check", 25, 75, SMALL),
    Row("scorer in bf16", "scorer.check", 25, 75, SMALL),
    Row("training step, 1B, 4 x 1,024", "steps.measure", 35, 90, ONE | STEP),
    Row("score + generate, 1B", "generation.measure", 50, 100, ONE | BOTH),
    Row("scorer training, 1B", "prefixes.measure", 40, 90, ONE | MANY),
    Row("training step, 1B, 1 x 512", "steps.measure", 20, 60, ONE | SHORT_STEP),
    Row("score + generate, 7B", "generation.measure", 50, 100, SEVEN | ONE_ROW),
    Row("gates and removal, 1B", "structure.measure", 40, 90, ONE | REMOVAL),
    Row("gates and removal, 7B", "structure.measure", 50, 110, SEVEN | BIG_REMOVAL),
    Row("experts, 1B", "experts.measure", 50, 110, ONE | EXPERTS),
    Row("experts, 7B", "experts.measure", 60, 130, SEVEN | BIG_EXPERTS),
    Row("engines, layers compiled", "engines.check", 45, 110, SMALL | LAYERS | ENGINES),
    Row("scorer, CUDA graph", "scorer.graph", 15, 45, ONE | GRAPH),
    Row("training step, 1B, layers compiled", "steps.measure", 60, 120, ONE | STEP | LAYERS),
    Row("scorer training, 7B", "prefixes.measure", 50, 110, SEVEN | FEW),
    Row("engines, flash attention 2", "engines.check", 10, 60, SMALL | FLASH),
    Row("scorer, flash attention 2", "scorer.check", 10, 60, SMALL | FLASH),
    Row("scorer, layers compiled", "scorer.check", 35, 90, SMALL | LAYERS | SCORERS | SLOW),
    Row("engines, model compiled", "engines.check", 40, 90, SMALL | WHOLE | SLOW),
)

OF_A_REAL_MODEL = (
    Row("training step, SmolLM2, 4 x 1,024", "steps.measure", 20, 60, REAL | STEP),
    Row("score + generate, SmolLM2", "generation.measure", 25, 75, REAL | ONE_ROW),
)
AFTER = "training step, 1B, 1 x 512"
"""The row that those of a real model follow."""


def rows_of(*, dry: bool = False, model: Path | None = None) -> list[Row]:
    """All rows, or the same at tiny sizes; those of a real model only where its folder is given."""
    rows = list(FULL)
    if model is not None:
        at = [row.name for row in rows].index(AFTER) + 1
        rows[at:at] = [_with(row, folder=str(model.absolute())) for row in OF_A_REAL_MODEL]
    return [_tiny(row) for row in rows] if dry else rows


def _with(row: Row, **settings: Any) -> Row:
    return Row(row.name, row.function, row.expected, row.limit, row.settings | settings)


TINY = {
    "geometry": "tiny",
    "batch": 2,
    "length": 64,
    "prompt": 64,
    "new": 4,
    "rounds": 1,
    "prompts": 4,
    "epochs": 2,
    "backend": "eager",
    "disable": True,
    "engines": ["exact"],
    "scorers": ["one row"],
}


def _tiny(row: Row) -> Row:
    """The same row, small enough for a CPU. A real model stays as it is."""
    sizes = {name: value for name, value in TINY.items() if name in row.settings}
    return Row(row.name, row.function, 0, row.limit, row.settings | sizes)
