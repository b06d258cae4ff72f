"""What a cycle of plasticity knows about the heads of one attention block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pliant.anatomy.find import device_of
from pliant.structure.units import Site

OPEN, CLOSED, REGROWN = range(3)


class HeadStates(nn.Module):
    """The heads of one site, as buffers."""

    state: Tensor
    """OPEN, CLOSED or REGROWN."""
    since: Tensor
    """After how many steps of training it began to grow again."""
    gate: Tensor
    """What its gate was when it was closed."""
    slot: Tensor
    """The number of the parameter that holds what it learns; -1 if it has none."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        device = device_of(site.module)
        for name in ("state", "since"):
            self.register_buffer(name, torch.zeros(site.count, dtype=torch.long, device=device))
        self.register_buffer("slot", torch.full((site.count,), -1, device=device))
        self.register_buffer("gate", torch.ones(site.count, device=device))
        self._slots: list[tuple[int, int]] = []

    def take(self, gate: Tensor) -> None:
        """At first: heads whose gates are 0 already are closed."""
        if not bool((self.state != OPEN).any()):
            self.state[gate == 0] = CLOSED

    def close(self, head: int, gate: float) -> None:
        if int(self.state[head]) == OPEN:
            self.gate[head] = gate
        self.state[head] = CLOSED

    def regrow(self, head: int, step: int, free_slot: int) -> None:
        self.state[head] = REGROWN
        self.since[head] = step
        if int(self.slot[head]) < 0:
            self.slot[head] = free_slot
        self._list_slots()

    def slots(self) -> list[tuple[int, int]]:
        """(head, slot) of each head that has grown again."""
        return self._slots

    def _list_slots(self) -> None:
        self._slots = [(head, slot) for head, slot in enumerate(self.slot.tolist()) if slot >= 0]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._list_slots()
