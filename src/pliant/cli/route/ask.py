"""`pliant route ask`: one prompt through a router, with the decision and its cost."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le

from pliant.cli import terminal
from pliant.cli.route import RouterOptions
from pliant.errors import InvalidInput
from pliant.options import Flag

if TYPE_CHECKING:
    from pliant.routing.live.decision import Decision, Reply
    from pliant.routing.prompts import Prompt


@dataclass(frozen=True, kw_only=True)
class AskOptions(RouterOptions):
    prompt: Annotated[str, Flag(positional=True)] | None = None
    """If it is left out or -, the prompt is read from stdin."""
    messages: bool = False
    """The prompt is JSON: a list of messages."""
    choose: bool = False
    """Only show which model should answer."""
    group: str | None = None
    """The prompt's group, if you know it."""
    share: Annotated[float, Ge(0), Le(1)] | None = None
    """Instead of the router's threshold: the share of calls that may go to the strongest model, as
    in 0.3."""
    max_new_tokens: Annotated[int, Ge(1)] | None = None
    """The longest answer, in tokens."""
    temperature: float | None = None
    """0 picks the most likely tokens."""
    samples: Annotated[int, Ge(1)] | None = None
    """Ask this many times, and return the most frequent answer."""
    ledger: str | None = None
    """Another file for the ledger; none: keep no ledger."""
    device: str | None = None
    """Where local models run: cpu, cuda, ..."""
    json: bool = False
    """Print one JSON document."""

    def generation(self) -> dict[str, Any]:
        """The generation settings that replace the router's."""
        names = ("max_new_tokens", "temperature", "samples")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def ask(options: AskOptions) -> None:
    """Ask a prompt through a router: the answer, and a line with the decision and its cost.

    Exit code 2 if no model answered.

    Example: pliant route ask --router my-router "What is 2 + 2?"
    """
    from pliant.routing.backends import BackendWarning
    from pliant.routing.router import AS_THE_FILE_SAYS, DriftWarning, Router

    options.register_scorer()
    prompt = read_prompt(options.prompt, options.messages)
    ledger: Any = {None: AS_THE_FILE_SAYS, "none": None}.get(options.ledger, options.ledger)
    with (
        terminal.shown_warnings(DriftWarning, BackendWarning),
        Router.load(options.router, ledger=ledger, device=options.device) as router,
    ):
        result: Decision | Reply = (
            router.choose(prompt, group=options.group, share=options.share)
            if options.choose
            else router.ask(
                prompt, group=options.group, share=options.share, **options.generation()
            )
        )
    if options.json:
        terminal.print_json(result.as_dict())
    else:
        _draw(result)


def read_prompt(text: str | None, messages: bool) -> Prompt:
    if text in (None, "-"):
        if sys.stdin.isatty() and text is None:
            raise InvalidInput("no prompt: give it as an argument, or on stdin")
        text = terminal.read_stdin().removesuffix("\n")
    assert text is not None
    if not messages:
        return text
    try:
        prompt: Prompt = json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"--messages needs a list of messages in JSON ({error})") from None
    if not isinstance(prompt, list):
        raise InvalidInput("--messages needs a list of messages in JSON")
    return prompt


def _draw(result: Decision | Reply) -> None:
    from pliant.routing.live.decision import Reply
    from pliant.routing.units import amount, saving

    console = terminal.console()
    decision = result.decision if isinstance(result, Reply) else result
    line = [decision.model, decision.reason]
    if decision.score is not None:
        line.append(f"score {decision.score:.3f}")
    if decision.gain is not None and "expected gain" not in decision.reason:
        line.append(f"gain {decision.gain:+.3f}")
    if isinstance(result, Reply):
        console.print(result.text, markup=False, soft_wrap=True)
        line.append(f"cost {amount(result.cost, result.unit)}")
        line.append(saving(result.saved, result.unit, result.strongest))
    console.print(" | ".join(line), markup=False, soft_wrap=True, style="dim")
