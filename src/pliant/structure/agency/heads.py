"""What is known about the heads of one attention block: their states and running averages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pliant.structure.agency.report import STATES, HeadReport, State
from pliant.structure.config import AgencyConfig
from pliant.structure.units import Site

WEIGHTS: dict[State, float] = {
    "active": 1.0,
    "overloaded": 0.5,
    "misaligned": 0.7,
    "withdrawn": 0.0,
}
ACTIVE, OVERLOADED, MISALIGNED, WITHDRAWN = range(len(STATES))


class Heads(nn.Module):
    """The buffers of one site, each with a value for every head."""

    state: Tensor
    """Indices of STATES."""
    consent: Tensor
    utilisation: Tensor
    derivative: Tensor
    """The running average of the loss's derivative with respect to the gate."""
    square: Tensor
    """(1,): the running average of the mean square of these."""
    overloaded_for: Tensor
    """Observations since it became overloaded."""
    weight: Tensor
    """What the state and the consent multiply the gate by."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        device = next((p.device for p in site.module.parameters()), torch.device("cpu"))
        for name in ("utilisation", "derivative"):
            self.register_buffer(name, torch.zeros(site.count, device=device))
        for name in ("state", "overloaded_for"):
            self.register_buffer(name, torch.zeros(site.count, dtype=torch.long, device=device))
        self.register_buffer("consent", torch.ones(site.count, dtype=torch.bool, device=device))
        self.register_buffer("square", torch.zeros(1, device=device))
        weight = torch.ones(site.count, device=device)
        self.register_buffer("weight", weight, persistent=False)  # follows state and consent

    @property
    def locked(self) -> Tensor:
        """Which heads are withdrawn or without consent."""
        return ~self.consent | (self.state == WITHDRAWN)

    @property
    def misalignment(self) -> Tensor:
        """The averaged derivative as a share of the root mean square of all heads' derivatives."""
        return self.derivative / self.square.sqrt().clamp(min=1e-30)

    def set(self, head: int, state: State, consent: bool) -> None:
        self.state[head] = STATES.index(state)
        self.consent[head] = consent
        self.overloaded_for[head] = 0
        self._refresh()

    def observe(self, utilisation: Tensor, derivative: Tensor, config: AgencyConfig) -> None:
        """Take a batch's measurements into the running averages.

        The derivative counts without the state's weight. A weight of 0 hides it, so that average of
        a locked head stays as it was.
        """
        self.utilisation.lerp_(utilisation.to(self.utilisation), 1 - config.momentum)
        seen = self.weight > 0
        if seen.any():
            new = 1 - config.derivative_momentum
            own = derivative[seen].to(self.derivative) / self.weight[seen]
            self.derivative[seen] = self.derivative[seen].lerp(own, new)
            self.square.lerp_(own.square().mean()[None], new)
        self.overloaded_for += (self.state == OVERLOADED) & ~self.locked

    def report(self, layer: int, block: int) -> list[HeadReport]:
        columns = (self.state, self.consent, self.weight, self.utilisation, self.misalignment)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [
            HeadReport(layer, block, head, STATES[state], *row)
            for head, (state, *row) in enumerate(rows)
        ]

    def _refresh(self) -> None:
        weights = torch.tensor([WEIGHTS[state] for state in STATES], device=self.state.device)
        self.weight.copy_(weights[self.state] * self.consent)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._refresh()
