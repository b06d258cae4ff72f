"""`pliant expert export-lora EXPERT`: an expert as a LoRA, for vLLM and for plain PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from pliant.cli import terminal
from pliant.cli.expert.merge import LeavingOptions
from pliant.errors import InvalidInput
from pliant.reports.tables import Table


@dataclass(frozen=True, kw_only=True)
class ExportLoraOptions(LeavingOptions):
    rank: Annotated[int, Ge(1)] | None = None
    """The same rank for every weight. Default: --budget."""
    budget: Annotated[int, Ge(1)] | None = None
    """How many parameters the LoRA may have: each weight gets the rank that is best for all.
    Default: --rank."""
    exclude: tuple[str, ...] = ()
    """A module that is left out, as out_proj or a part of a path; repeatable. Default: none
    is."""


def export_lora(options: ExportLoraOptions) -> None:
    """Write an expert as a LoRA in PEFT's format, which needs no Pliant.

    A LoRA of a low rank keeps a part of the expert: how much is shown, as energy and as the largest
    difference of a logit. PEFT reloads it on a fresh base before it is kept.

    Example: pliant expert export-lora math --base nano-s --rank 16 --out math-lora
    """
    options.check_out()
    if (options.rank is None) == (options.budget is None):
        raise InvalidInput(
            "give --rank, the same for every weight, or --budget, parameters in total"
        )
    model, _ = options.loaded()
    from pliant.experts.lora import to_lora

    assert options.out is not None
    result = to_lora(
        model, options.out, rank=options.rank, budget=options.budget, exclude=options.exclude
    )
    if options.json:
        terminal.print_json({"expert": options.expert, **result.as_dict()})
        return
    rows = [
        [name, str(result.ranks.get(name, 0)), f"{energy:.1%}"]
        for name, energy in result.energies.items()
    ]
    head = ["weight", "rank", "energy kept"]
    table = Table("ranks", head, rows, right=frozenset(head) - {"weight"})
    terminal.draw([table], [str(result)])
