"""`pliant route ask`: one prompt through a router, with what was decided and what it cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pliant.routing.live.decision import Decision, Reply
    from pliant.routing.prompts import Prompt

EXAMPLE = 'pliant route ask --router my-router "What is 2 + 2?"'


def ask(
    router: Annotated[Path, typer.Option(help="The folder that `pliant route fit` has made.")],
    prompt: Annotated[str | None, typer.Argument(help="Left out or -, it is read from stdin.")] = (
        None
    ),
    messages: Annotated[
        bool, typer.Option("--messages", help="The prompt is JSON: a list of messages.")
    ] = False,
    choose: Annotated[
        bool, typer.Option("--choose", help="Only say which model should answer.")
    ] = False,
    group: Annotated[str | None, typer.Option(help="The prompt's group, if it is known.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="The longest answer.", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="0: the likeliest tokens.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Answers, of which the most frequent counts.", min=1)
    ] = None,
    ledger: Annotated[
        str | None, typer.Option(help="Another file for the ledger; none: keep no ledger.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where models run that run here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Ask a prompt through a router: the answer, and a line with the decision and its cost.

    Exit code 2 if no model answered.
    """
    import warnings

    from pliant.cli import terminal
    from pliant.routing.router import AS_THE_FILE_SAYS, DriftWarning, Router

    asked = _prompt(prompt, messages)
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "samples": samples}
    given: dict[str, Any] = {name: x for name, x in settings.items() if x is not None}
    place: Any = AS_THE_FILE_SAYS if ledger is None else None if ledger == "none" else ledger
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DriftWarning)
        with Router.load(router, ledger=place, device=device) as found:
            result: Decision | Reply = (
                found.choose(asked, group=group)
                if choose
                else found.ask(asked, group=group, **given)
            )
    for warning in caught:
        if issubclass(warning.category, DriftWarning):
            terminal.console(stderr=True).print(f"warning: {warning.message}", soft_wrap=True)
    if json:
        terminal.print_json(result.as_dict())
    else:
        _draw(result)


def _prompt(text: str | None, messages: bool) -> Prompt:
    import json

    from pliant.errors import InvalidInput

    if text in (None, "-"):
        if sys.stdin.isatty() and text is None:
            raise InvalidInput("no prompt: give it as an argument, or on stdin")
        text = sys.stdin.read().removesuffix("\n")
    assert text is not None
    if not messages:
        return text
    try:
        found: Prompt = json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"--messages wants a list of messages in JSON ({error})") from None
    if not isinstance(found, list):
        raise InvalidInput("--messages wants a list of messages in JSON")
    return found


def _draw(result: Decision | Reply) -> None:
    from pliant.cli import terminal
    from pliant.routing.live.decision import Reply

    console = terminal.console()
    decision = result.decision if isinstance(result, Reply) else result
    line = [decision.model, decision.reason]
    if decision.score is not None:
        line.append(f"score {decision.score:.3f}")
    if isinstance(result, Reply):
        console.print(result.text, markup=False, soft_wrap=True)
        line += [f"cost {result.cost:.4g} {result.unit}", f"saved {result.saved:.4g}"]
    console.print(" | ".join(line), markup=False, soft_wrap=True, style="dim")
