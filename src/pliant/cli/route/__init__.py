"""The commands of `pliant route`, and the options that several share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from pliant.cli.shared_options import PromptColumns
from pliant.options import Flag

if TYPE_CHECKING:
    from pliant.routing.outcomes import Outcomes

HELP = """Send each prompt to the model that it needs.

Label a file of prompts, 50 or more, with the models that get them right, fit a router on the
labels, ask through it.

Example: pliant route label --prompts questions.jsonl --model nano-s --model nano-l
--out labels.jsonl
"""
# Every command of the group and its line in `pliant route --help`.
COMMANDS = {
    "ask": "Ask a prompt through a router.",
    "calibrate": "Recompute a router's probabilities and threshold.",
    "evaluate": "Measure a router on held-out prompts.",
    "fit": "From labels to a router: try scorers, keep one, set its threshold.",
    "grade": "Record which of a router's answers were right.",
    "label": "Run models over prompts: which are right, and at what cost?",
    "learn": "Correct a router by the graded answers in its ledger.",
    "report": "Everything measured about a router, as one HTML page.",
}
MODULES = {"calibrate": "fit", "evaluate": "fit"}


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    router: Path
    """The folder that `pliant route fit` wrote."""
    scorer: Annotated[str | None, Flag(metavar="MODULE:CLASS")] = None
    """The class of the router's scorer, if it is your own: my_module:Mine, or mine.py:Mine."""

    def register_scorer(self) -> None:
        """Import the class of a scorer of one's own, which no file may name."""
        if self.scorer is not None:
            from pliant.routing.scorers import kind_class

            kind_class(self.scorer)


@dataclass(frozen=True, kw_only=True)
class LabelsOptions(PromptColumns):
    labels: str
    """Labels of prompts that the router was not fitted on."""
    model: tuple[str, ...] = ()
    """A model's column in the labels; repeatable. Default: all of them."""
    right_column: str = "right"
    """The column that holds, by model, whether it is right: true, a share, or {"correct": true}."""
    cost_column: str = "cost"
    """The column that holds the cost of each answer by model."""
    unit: Literal["tokens", "usd", "ms", "flops", "calls"] | None = None
    """Of the costs. Default: as the rows state it."""
    group_column: str = "group"
    """The column of the subject, family or source of each prompt."""
    wording_column: str = "wording"
    """The column that tells several wordings apart."""
    question_column: str = "question"
    """The column that names the question, where several prompts word the same one."""
    limit: Annotated[int, Ge(1)] | None = None
    """Read only the first labels."""
    json: bool = False
    """Print one JSON document."""

    @property
    def columns(self) -> dict[str, Any]:
        """The arguments of `Outcomes.read`."""
        self.check_columns()
        names = ("right", "cost", "group", "wording", "question")
        columns = {name: getattr(self, f"{name}_column") for name in names}
        columns |= {"prompt": self.prompt_column or "prompt", "messages": self.messages_column}
        return {**columns, "unit": self.unit, "limit": self.limit}

    def outcomes(self) -> Outcomes:
        """The labels, read and checked."""
        from pliant.routing.outcomes import Outcomes

        return Outcomes.read(self.labels, models=self.model or None, **self.columns)
