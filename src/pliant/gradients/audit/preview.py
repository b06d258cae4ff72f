"""Which tokens of a batch would be trained, one by one, for display."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pliant.anatomy.find import unwrap
from pliant.gradients.audit.audit import placed
from pliant.gradients.audit.contenders import Batch, Contender, Field, steady
from pliant.gradients.audit.snapshot import restored
from pliant.gradients.config import GradientConfig
from pliant.gradients.labelled_batch import LabelledBatch
from pliant.gradients.selection.rules import Chosen
from pliant.gradients.selector import Router
from pliant.gradients.telemetry import OperationCount, Telemetry


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
