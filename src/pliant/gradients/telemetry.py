"""What selective training did, summed on the device: only reading the sums synchronizes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pliant.gradients.labelled_batch import LabelledBatch
from pliant.gradients.operations import OperationCount, TokenCost
from pliant.gradients.selection.rules import Chosen, wide


@dataclass
class Tally:
    """Sums over some forward passes."""

    passes: int = 0
    selected: int = 0
    """Tokens that were trained."""
    ledger: OperationCount = field(default_factory=OperationCount)
    sums_4: Tensor | None = None
    """On the device: labelled tokens; the losses of those that were trained; the losses of those
    that were not, and how many of these are known or estimated."""

    def add(self, other: Tally) -> None:
        self.passes += other.passes
        self.selected += other.selected
        self.ledger.add(other.ledger)
        if other.sums_4 is not None:
            self.sums_4 = other.sums_4 if self.sums_4 is None else self.sums_4 + other.sums_4

    def figures(self, cost: TokenCost | None) -> dict[str, float]:
        """Synchronizes with the device."""
        if self.sums_4 is None:
            return {}
        total, trained, left, known = self.sums_4.tolist()
        metrics = {
            "tokens_selected": float(self.selected),
            "tokens_total": total,
            "ratio": self.selected / max(1.0, total),
            "loss_selected": trained / max(1, self.selected),
        }
        if known:
            metrics["loss_unselected"] = left / known
        return metrics | self._operations(cost)

    def _operations(self, cost: TokenCost | None) -> dict[str, float]:
        passes = {
            "backbone_passes": float(self.ledger.backbone_quiet),
            "backbone_trained": float(self.ledger.backbone_live),
            "head_passes": float(self.ledger.head_quiet),
            "head_trained": float(self.ledger.head_live),
        }
        if cost is None or not self.ledger.tokens:
            return passes
        flops, standard = self.ledger.flops(cost), self.ledger.standard_flops(cost)
        return {**passes, "flops": flops, "flops_of_standard": flops / max(1.0, standard)}


class Telemetry:
    """The last forward pass, all since it was last logged, and all of the run."""

    def __init__(self) -> None:
        self.last = Tally()
        self.window = Tally()
        self.run = Tally()

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
        """A forward pass is over. `losses_BT` are those of all labelled tokens, if they are known
        from the selection; `fair` draws estimate them without bias."""
        ledger.tokens += batch.targets_BT.numel()
        losses_N = losses_N.detach()
        if losses_BT is not None:
            left = losses_BT.sum() - losses_N.sum()
        elif fair:  # a token of weight w represents itself and w - 1 that were not drawn
            live_BK, weights_BK = chosen.live_BK, chosen.weights_BK
            losses_BK = torch.zeros_like(weights_BK).masked_scatter(live_BK, losses_N.float())
            left = ((weights_BK - 1) * losses_BK).sum()
        else:
            left = None
        self.last = Tally(1, len(losses_N), ledger, _sums(batch.valid_BT, losses_N, left))
        self.window.add(self.last)
        self.run.add(self.last)

    def metrics(self, cost: TokenCost | None = None) -> dict[str, float]:
        """Of the last forward pass."""
        return self.last.figures(cost)

    def totals(self, cost: TokenCost | None = None) -> dict[str, float]:
        """Of the whole run."""
        return self.run.figures(cost)

    def logged(self, cost: TokenCost | None = None) -> dict[str, float]:
        """Of the window since the last call; a new one begins."""
        window, self.window = self.window, Tally()
        return window.figures(cost)


def _sums(valid_BT: Tensor, losses_N: Tensor, left: Tensor | None) -> Tensor:
    total, trained = valid_BT.sum(), losses_N.sum()
    known = torch.zeros_like(total) if left is None else total - len(losses_N)
    left = torch.zeros_like(trained) if left is None else left
    return torch.stack([x.to(wide(x)) for x in (total, trained, left, known)])
