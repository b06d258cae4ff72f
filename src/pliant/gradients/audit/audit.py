"""One step of each contender, on the user's own batches: how good is its gradient, at what cost?

And token by token, for display: which of a batch would be trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pliant.anatomy.find import unwrap
from pliant.errors import InvalidInput
from pliant.gradients.audit.contenders import (
    Batch,
    Contender,
    Field,
    clear_gradients,
    contenders_for,
    restored,
    rows_in,
    split_and_labelled,
    steady,
    trained,
)
from pliant.gradients.audit.step import GradientComparison, Quality, StepCost, costs
from pliant.gradients.config import GradientConfig
from pliant.gradients.labelled_batch import LabelledBatch, is_labelled
from pliant.gradients.selection.rules import Chosen
from pliant.gradients.selector import Router
from pliant.gradients.telemetry import OperationCount, Telemetry
from pliant.stats import Band, as_json

DRAWS, TURNS = 16, 9
Progress = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Finding:
    """One contender's gradient and cost."""

    contender: Contender
    quality: Quality
    cost: StepCost
    notes: tuple[str, ...]
    """What was computed in another way than configured, and why."""

    @property
    def name(self) -> str:
        return self.contender.name

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "config": as_json(self.contender.config),
            **as_json(self.quality),
            **as_json(self.cost),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Audit:
    """All contenders: the configuration under test first, standard training last."""

    findings: tuple[Finding, ...]
    batches: int
    sequences: int
    tokens: int
    """Labelled ones, in all batches."""
    draws: int

    def __getitem__(self, name: str) -> Finding:
        return next(f for f in self.findings if f.name == name)

    @property
    def ours(self) -> Finding:
        return self.findings[0]

    @property
    def sentence(self) -> str:
        """The finding. Whether the configuration trains better, only a race can tell."""
        ours, theirs = self.ours, [f for f in self.findings if f.contender.kind == "rows"]
        finding = (
            f"{ours.name}: {_band(ours.cost.speed)} times as fast a step as standard training, "
            f"with {self.memory(ours):.2f} of its memory; its gradient's cosine with the full one "
            f"is {_band(ours.quality.cosine)}"
        )
        if not theirs:
            return finding + "."
        return (
            f"{finding}, that of {theirs[0].name}, at about that cost, "
            f"{_band(theirs[0].quality.cosine)}."
        )

    def __str__(self) -> str:
        return self.sentence

    def memory(self, finding: Finding) -> float:
        """As a share of standard training's."""
        return finding.cost.memory / max(1, self.findings[-1].cost.memory)

    def as_dict(self) -> dict[str, Any]:
        return {
            "batches": self.batches,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "draws": self.draws,
            "sentence": self.sentence,
            "findings": [finding.as_dict() for finding in self.findings],
        }


def audit(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    config: GradientConfig | None = None,
    *,
    router: Router | None = None,
    draws: int = DRAWS,
    turns: int = TURNS,
    progress: Progress | None = None,
) -> Audit:
    """Compare `config`'s gradient with the full one of the same batches, and with the controls.

    A batch is what the model is called with, labels among it. It is measured as
    after its warm-up, without the schedule. The model is restored afterwards.
    """
    config, model = config or GradientConfig(), unwrap(model)
    batch_list: list[Batch] = [batches] if isinstance(batches, Mapping) else list(batches)
    tokens = _checked(model, batch_list, draws, turns)
    with restored(model):
        on_device = [placed(batch, model) for batch in batch_list]
        share = cost_share(model, on_device[0], config, router)
        contenders = contenders_for(config, share, rows_in(on_device[0]))
        with Field(model, contenders, router) as field:
            comparison = GradientComparison(field, draws)
            for batch in (progress or no_progress)(on_device, "comparing gradients"):
                comparison.add(batch)
            cost = costs(field, on_device, turns)
            notes = {c: tuple(field.notes.get(c, ())) for c in contenders}
    findings = tuple(Finding(c, comparison.quality(c), cost[c], notes[c]) for c in contenders)
    return Audit(findings, len(batch_list), sum(map(rows_in, batch_list)), tokens, draws)


def cost_share(
    model: nn.Module,
    batch: Batch,
    config: GradientConfig,
    router: Router | None,
) -> float | None:
    """The operations of a step, as a share of a standard step's."""
    ours = Contender("tokens", steady(config))
    with Field(model, [ours], router) as field:
        field.step(ours, batch)
        clear_gradients(model)
        return field.handles[ours].metrics().get("flops_of_standard")


def _checked(model: nn.Module, batches: Sequence[Batch], draws: int, turns: int) -> int:
    """The number of labelled tokens."""
    if not batches:
        raise InvalidInput("there are no batches to compare gradients on")
    if draws < 2 or turns < 1:
        raise InvalidInput(f"draws = {draws} and turns = {turns}: give 2 and 1, or more")
    trained(model)
    for batch in batches:
        rows_in(batch)
        if not is_labelled(batch):
            raise InvalidInput(f"a batch has no labels, only {', '.join(batch)}")
    tokens = sum(int(split_and_labelled(model, b)[1].valid_BT.sum()) for b in batches)
    if not tokens:
        raise InvalidInput("no token of these batches is labelled: there is no gradient to compare")
    return tokens


def placed(batch: Batch, model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def no_progress(items: Sequence[Any], what: str) -> Iterable[Any]:
    return items


def _band(band: Band) -> str:
    if band.low == band.high:  # measured once
        return f"{band.value:.2f}"
    return f"{band.value:.2f} [{band.low:.2f}, {band.high:.2f}]"


# --- which tokens are trained ---------------------------------------------------------------------


@dataclass(frozen=True)
class ShownToken:
    """A token, and how it is trained."""

    id: int
    labelled: bool
    weight: float
    """Its weight in the loss; 0 if it is not trained."""
    loss: float | None
    """Where it is known: of what is trained, and of all that was scored."""

    @property
    def trained(self) -> bool:
        return self.weight > 0


Shown = tuple[tuple[ShownToken, ...], ...]
"""Row after row, without padding."""


def show(
    model: nn.Module,
    batch: Batch,
    config: GradientConfig | None = None,
    *,
    router: Router | None = None,
    draw: int = 0,
) -> Shown:
    """One draw of `config`'s tokens after its schedule has ended; the model stays as it is.

    Scores are computed from the full vocabulary, so that every token's loss is known.
    """
    whole = replace(steady(config or GradientConfig()), score_share=1.0)
    model, ours = unwrap(model), Contender("tokens", whole)
    with restored(model), Field(model, [ours], router) as field:
        watching = Watching()
        field.handles[ours].telemetry = watching
        with field.only(ours):
            field.loss(ours, placed(batch, model), draw)
    mask = batch.get("attention_mask")
    ids = batch["input_ids"].tolist()
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
    return tuple(
        tuple(token for token, inside in zip(watching.row(b, row), mask[b], strict=True) if inside)
        for b, row in enumerate(ids)
    )


class Watching(Telemetry):
    """Records which tokens were chosen, instead of counting them."""

    def trained(
        self,
        batch: LabelledBatch,
        chosen: Chosen,
        losses_N: Tensor,
        losses_BT: Tensor | None,
        ledger: OperationCount,
        *,
        fair: bool = False,
    ) -> None:
        at_BK, live_BK = chosen.positions_BK.cpu(), chosen.live_BK.cpu()
        self.valid_BT = batch.valid_BT.cpu()
        losses = torch.full(self.valid_BT.shape, torch.nan)
        if losses_BT is not None:
            losses[self.valid_BT] = losses_BT.float().cpu()[self.valid_BT]
        rows = torch.arange(len(at_BK))[:, None].expand_as(at_BK)
        losses[rows[live_BK], at_BK[live_BK]] = losses_N.detach().float().cpu()
        self.losses_BT = losses
        self.weights_BT = torch.zeros(self.valid_BT.shape)
        self.weights_BT[rows[live_BK], at_BK[live_BK]] = chosen.weights_BK.cpu()[live_BK]

    def row(self, b: int, ids: list[int]) -> list[ShownToken]:
        """A position predicts the token after it: the first token of a row is predicted by none."""
        tokens = [ShownToken(ids[0], False, 0.0, None)]
        for t, token in enumerate(ids[1:]):
            loss = float(self.losses_BT[b, t])
            known: Any = None if loss != loss else loss
            valid = bool(self.valid_BT[b, t])
            tokens.append(ShownToken(token, valid, float(self.weights_BT[b, t]), known))
        return tokens
