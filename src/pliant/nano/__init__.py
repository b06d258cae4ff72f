"""Two tiny embedded models, and the world of verifiable questions that they were trained on.

from pliant import nano

model, tokenizer = nano.load("nano-s")
questions = nano.questions("test", n=100, seed=0)
answers = nano.ask(model, tokenizer, [question.prompt for question in questions])
right = sum(question.check(answer) for question, answer in zip(questions, answers))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pliant.errors import ModelNotFound
from pliant.nano.families import DIFFICULTIES, HELD_OUT, TRAINED, WORDINGS, Family, Question
from pliant.nano.world import conversations, questions, stream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAMES = ("nano-s", "nano-l")

__all__ = [
    "DIFFICULTIES",
    "HELD_OUT",
    "NAMES",
    "TRAINED",
    "WORDINGS",
    "Family",
    "Question",
    "ask",
    "conversations",
    "load",
    "path",
    "questions",
    "stream",
]


def path(name: str) -> Path:
    """The folder of an embedded checkpoint, for plain `AutoModelForCausalLM.from_pretrained`."""
    from pliant.loading import WEIGHTS

    if name not in NAMES:
        raise ModelNotFound(f"no embedded model is called {name!r}; there are {', '.join(NAMES)}")
    return WEIGHTS / name


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An embedded model in fp32 and eval mode, and its tokenizer."""
    from pliant.loading import load as load_any

    return load_any(path(name))


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[str]:
    """The model's greedy answers, in the order of the prompts."""
    from pliant.nano.answers import answers

    return answers(model, tokenizer, prompts)
