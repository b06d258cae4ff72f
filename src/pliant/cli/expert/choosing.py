"""What the commands that choose experts share: their options, and the model with its experts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le

from pliant.cli import terminal
from pliant.cli.shared_options import DeviceOptions
from pliant.errors import InvalidInput
from pliant.loading.dtypes import Dtype
from pliant.options import Flag, named_values

if TYPE_CHECKING:
    from pliant.experts.adapting import Choice, Strategy


@dataclass(frozen=True, kw_only=True)
class ExpertsOptions(DeviceOptions):
    experts: Annotated[tuple[str, ...], Flag(aliases=("-e",))] = ()
    """The folder of an expert, or of several; repeatable. Needed."""
    base: str | None = None
    """Their base: nano-s, a folder, or a name on the hub. Default: the one that they name."""
    dtype: Dtype = "auto"
    """The base's type; auto: as it was saved."""
    json: bool = False
    """Print one JSON document."""

    def loaded(self) -> tuple[Any, Any]:
        """The model with the experts on it, and its tokenizer."""
        from pliant import loading
        from pliant.experts.adapting import load_experts
        from pliant.experts.adapting.folders import base_of, expert_folders

        if not self.experts:
            raise InvalidInput("there are no experts: name their folders, --experts FOLDER")
        folders = expert_folders(self.experts)
        base = self.base or base_of(folders)
        terminal.hide_loading_bars()
        model, tokenizer = loading.load(base, dtype=self.dtype, device=self.device)
        return load_experts(model, self.experts), tokenizer


@dataclass(frozen=True, kw_only=True)
class ChoosingOptions(ExpertsOptions):
    by: Literal["prompt", "classifier"] | None = None
    """The model itself classifies (prompt), or a fitted head does. Default: the head, if given."""
    classifier: str | None = None
    """The folder of a fitted head, as `pliant expert classify --out` writes it. Default: none."""
    label: Annotated[tuple[str, ...], Flag(metavar="NAME=TEXT")] = ()
    """What an expert is for, in words that complete the sentence; default: its name."""
    sentence: str | None = None
    """The beginning of the sentence. Default: "The topic of this question is"."""
    threshold: Annotated[float, Ge(0), Le(1)] | None = None
    """A less probable expert leaves the prompt to the base. Default: 0.5 for a fitted head, else
    none does."""

    def check(self) -> None:
        """Before anything is loaded."""
        if self.by == "classifier" and self.classifier is None:
            raise InvalidInput("--by classifier needs a fitted head: --classifier FOLDER")
        if self.classifier is not None and self.by == "prompt":
            raise InvalidInput("--by prompt and --classifier: give one of them")
        if self.classifier is not None and (self.label or self.sentence):
            raise InvalidInput("--label and --sentence are for --by prompt, not for a fitted head")
        if self.classifier is not None and not Path(self.classifier).expanduser().is_dir():
            raise InvalidInput(f"{self.classifier}: no such folder")
        named_values(self.label, "--label", "name=text")

    def strategy(self, model: Any, tokenizer: Any) -> Strategy:
        from dataclasses import replace

        from pliant.experts.adapting import ByClassifier, ByPrompt, PromptConfig

        given: dict[str, Any] = {} if self.threshold is None else {"threshold": self.threshold}
        if self.classifier is not None:
            head = ByClassifier.from_pretrained(model, tokenizer, self.classifier)
            head.config = replace(head.config, **given)
            return head
        if self.sentence is not None:
            given["sentence"] = self.sentence
        return ByPrompt(model, tokenizer, self.labels(model), PromptConfig(**given))

    def labels(self, model: Any) -> Mapping[str, str] | None:
        """Every expert's label: the one given, or its name; names as they are in the folders."""
        from pliant.errors import did_you_mean
        from pliant.experts.adapting.prompts import experts_on

        if not self.label:
            return None
        labels = {name: name for name in experts_on(model)}
        by_option = {name.replace("-", "_"): name for name in labels}
        for name, text in named_values(self.label, "--label", "name=text").items():
            if name not in by_option:
                raise InvalidInput(f"--label {name}: no such expert{did_you_mean(name, labels)}")
            labels[by_option[name]] = text
        return labels


def read_prompts(texts: Sequence[str]) -> list[str]:
    """Those of the command line, or the one on stdin."""
    if texts and list(texts) != ["-"]:
        return list(texts)
    if sys.stdin.isatty() and not texts:
        raise InvalidInput("no prompt: give it as an argument, or on stdin")
    return [terminal.read_stdin().removesuffix("\n")]


def choice_line(choice: Choice) -> str:
    return f"{choice.name} | {choice.reason}"
