"""What selective training did: the tokens that went through the model, what operations these are,
and the losses, summed on the device (only reading these sums synchronizes)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.gradients.labelled_batch import LabelledBatch
from pliant.gradients.selection.rules import Chosen, wide


@dataclass
class OperationCount:
    """How many tokens went through the backbone and the head: quietly (no gradient), or live."""

    tokens: int = 0
    """What standard training would have run through both."""
    backbone_quiet: int = 0
    backbone_live: int = 0
    head_quiet: float = 0
    """A pass through some of its words counts as that share of one."""
    head_live: float = 0

    def backbone(self, tokens: int, *, live: bool, again: bool = False) -> None:
        """`again`: gradient checkpointing runs them once more, on the way back."""
        if live:
            self.backbone_live += tokens
        if again or not live:
            self.backbone_quiet += tokens

    def head(self, rows: float, *, live: bool) -> None:
        if live:
            self.head_live += rows
        else:
            self.head_quiet += rows

    def add(self, other: OperationCount) -> None:
        for name, count in asdict(other).items():
            setattr(self, name, getattr(self, name) + count)

    def flops(self, cost: TokenCost) -> float:
        """Of everything that was run."""
        quiet = self.backbone_quiet * cost.backbone + self.head_quiet * cost.head
        return quiet + self.backbone_live * cost.live_backbone + self.head_live * cost.live_head

    def standard_flops(self, cost: TokenCost) -> float:
        """Of standard training on the same batches."""
        return self.tokens * (cost.live_backbone + cost.live_head)


@dataclass(frozen=True)
class TokenCost:
    """The operations of one token's pass, from the sizes of the weights: two for each of them
    forward, and on the way back as many again, once for what is trained and once for what leads
    there. Attention's own products, which grow with the length, are left out, and every expert of a
    mixture counts as if it ran."""

    backbone: float
    head: float
    live_backbone: float
    live_head: float

    @classmethod
    def of(cls, anatomy: Anatomy) -> TokenCost:
        tables = {
            id(weight)
            for module in anatomy.decoder.modules()
            if isinstance(module, nn.Embedding)
            for weight in module.parameters(recurse=False)
        }
        inside = [p for p in anatomy.decoder.parameters() if id(p) not in tables]
        head = list(anatomy.head.parameters()) if anatomy.head is not None else []
        return cls(_quiet(inside), _quiet(head), _live(inside), _live(head))


def _quiet(weights: list[nn.Parameter]) -> float:
    return 2.0 * sum(getattr(p, "ds_numel", p.numel()) for p in weights)  # ds: in ZeRO-3's shards


def _live(weights: list[nn.Parameter]) -> float:
    return 2 * _quiet(weights) + _quiet([p for p in weights if p.requires_grad])


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

    def take_window(self) -> Tally:
        """The window since the last call; a new one begins."""
        window, self.window = self.window, Tally()
        return window


def _sums(valid_BT: Tensor, losses_N: Tensor, left: Tensor | None) -> Tensor:
    total, trained = valid_BT.sum(), losses_N.sum()
    known = torch.zeros_like(total) if left is None else total - len(losses_N)
    left = torch.zeros_like(trained) if left is None else left
    return torch.stack([x.to(wide(x)) for x in (total, trained, left, known)])
