"""`pliant expert ask`: each prompt picks its expert, and that expert answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from pliant.cli import terminal
from pliant.cli.expert.choosing import ChoosingOptions, choice_line, read_prompts
from pliant.options import Flag


@dataclass(frozen=True, kw_only=True)
class AskOptions(ChoosingOptions):
    prompt: Annotated[tuple[str, ...], Flag(positional=True)] = ()
    """One or more; if there is none or -, one is read from stdin."""
    max_new_tokens: Annotated[int, Ge(1)] = 64
    """The longest answer, in tokens."""


def ask(options: AskOptions) -> None:
    """Ask prompts: the answer to each, and a line with the expert that gave it and why.

    All prompts run in one batch, each with its own expert.

    Example: pliant expert ask --experts my-experts "What is 17 + 4?"
    """
    options.check()
    prompts = read_prompts(options.prompt)
    strategy = options.strategy(*options.loaded())
    answers = strategy.answer(prompts, max_new_tokens=options.max_new_tokens)
    if options.json:
        rows = zip(prompts, answers, strict=True)
        terminal.print_json([{"prompt": p, **answer.as_dict()} for p, answer in rows])
        return
    console = terminal.console()
    for answer in answers:
        console.print(answer.text, markup=False, soft_wrap=True)
        console.print(choice_line(answer.choice), markup=False, soft_wrap=True, style="dim")
