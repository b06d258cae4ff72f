"""Options that several commands share: the columns of rows, where a model runs, how it trains.

Closed sets of values are spelled out here, for a command's help must not wait for torch; a test
compares them with those of the parts.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le

from pliant.errors import InvalidInput
from pliant.options import Flag, named_values

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from pliant.loading import Dtype

Engine = Literal["sparse", "exact", "completion"]
EngineOrAuto = Literal["auto", "sparse", "exact", "completion"]
EngineOrStandard = Literal["standard", "auto", "sparse", "exact", "completion"]
Selection = Literal[
    "sampled", "uniform", "topk", "stratified", "sequence_aware", "fixed_quota", "all"
]
TokenScore = Literal["gradient", "loss", "entropy", "margin", "combined", "doubt"]
SEED = 42
"""The Trainer's own."""


# --- where a model runs --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    device: str | None = None
    """cpu, cuda, cuda:1, mps, ... Default: cpu."""


def load_to_train(name: str, dtype: Dtype, device: str | None) -> tuple[Any, Any]:
    """A model and its tokenizer; with no device named, the Trainer moves the model to an
    accelerator, if there is one."""
    import torch

    from pliant.loading import load, not_computed_here

    moves = device is None and torch.cuda.is_available()
    with not_computed_here() if moves else nullcontext():
        return load(name, dtype=dtype, device=device)


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """For commands that train with the Trainer."""

    set: Annotated[tuple[str, ...], Flag(metavar="NAME=VALUE")] = ()
    """Any other field of TrainingArguments; repeatable. Default: the Trainer's own values, but one
    epoch, and a checkpoint every 50 steps."""
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] = SEED
    """Of the order of the rows, of dropout and of what else is drawn."""
    device: str | None = None
    """cpu, cuda, ... Default: an accelerator, if there is one."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Also log to tensorboard (in OUT/runs) or wandb. --set report_to=... names others."""

    def settings(self) -> dict[str, str]:
        """The fields of TrainingArguments that the options set."""
        own = {} if self.seed == SEED else {"seed": str(self.seed)}
        own |= {} if self.report_to == "none" else {"report_to": self.report_to}
        own |= {"use_cpu": "true"} if self.device == "cpu" else {}
        others = named_values(self.set, "--set")
        for name in own.keys() & others.keys():
            flag = {"seed": "--seed", "report_to": "--report-to", "use_cpu": "--device"}[name]
            raise InvalidInput(f"{flag} and --set {name}: give one of them")
        return {**own, **others}

    def check_device(self, args: TrainingArguments) -> None:
        """Refuse a device that is not there, or that the Trainer would not train on."""
        from pliant.loading import torch_device

        device = torch_device(self.device)
        if device is None:
            return
        theirs: Any = args.device
        if device.type != theirs.type or (device.index or 0) != (theirs.index or 0):
            raise InvalidInput(
                f"--device {self.device}: the Trainer trains on {theirs}; to choose among several "
                "accelerators, set CUDA_VISIBLE_DEVICES"
            )


# --- which columns are read ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """For commands that read texts: docs/data-formats.md."""

    rows: Annotated[int, Ge(1)] | None = None
    """Read only this many rows. Default: all."""
    subset: str | None = None
    """The subset of a data set on the hub. Default: its only one."""
    text_column: str | None = None
    """The column of plain texts. Default: text."""
    prompt_column: str | None = None
    """The column of prompts. Default: prompt, or Alpaca's instruction and input."""
    completion_column: str | None = None
    """The column of completions, which are trained on. Default: completion, or Alpaca's output."""
    messages_column: str | None = None
    """The column of conversations. Default: messages, or ShareGPT's conversations."""

    def columns(self) -> dict[str, str]:
        """Our names of the columns that the options name, and the file's names."""
        pair = {"prompt": self.prompt_column, "completion": self.completion_column}
        named = {"text": self.text_column, "messages": self.messages_column}
        kinds = [{ours: theirs} for ours, theirs in named.items() if theirs is not None]
        if any(pair.values()):
            kinds.append({ours: theirs or ours for ours, theirs in pair.items()})
        if len(kinds) > 1:
            raise InvalidInput(
                "a row is a text, or a prompt and its completion, or a conversation: name the "
                "columns of one of these, and not " + " and ".join(kinds[0] | kinds[1])
            )
        return kinds[0] if kinds else {}


@dataclass(frozen=True, kw_only=True)
class PromptColumns:
    """For commands that read prompts: docs/data-formats.md."""

    prompt_column: Annotated[str | None, Flag(aliases=("--column",))] = None
    """The column of prompts: texts, or lists of messages. Default: prompt, or Alpaca's instruction
    and input."""
    messages_column: str | None = None
    """The column of conversations: what comes before the last answer is the prompt. Default:
    messages, or ShareGPT's conversations."""

    def read(self, source: str, *others: str, limit: int | None = None) -> list[dict[str, Any]]:
        """The rows, with a prompt and the other columns each."""
        from pliant.data import read_prompts

        self.check_columns()
        named = {"prompt": self.prompt_column, **self.answers()}
        columns = {name: named.get(name) or name for name in ("prompt", *others)}
        return read_prompts(source, columns, messages=self.messages_column, limit=limit)

    def check_columns(self) -> None:
        """Refuse another column beside that of conversations, which hold prompts and answers."""
        for name, column in {"prompt": self.prompt_column, **self.answers()}.items():
            if column is not None and self.messages_column is not None:
                raise InvalidInput(f"--{name}-column and --messages-column: give one of them")

    def answers(self) -> dict[str, str | None]:
        return {}


@dataclass(frozen=True, kw_only=True)
class AnswerColumns(PromptColumns):
    """For commands that read prompts and their right answers."""

    answer_column: Annotated[str | None, Flag(aliases=("--completion-column",))] = None
    """The column of right answers. Default: answer, or completion, or Alpaca's output, or the last
    message of a conversation."""

    def answers(self) -> dict[str, str | None]:
        return {"answer": self.answer_column}
