"""What training runs, counted on the way: passes of one token, and what operations these are."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn

from pliant.anatomy import Anatomy


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
