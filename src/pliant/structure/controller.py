"""A controller of gates: it learns, while the model trains, which gates to close within a budget.

    controller = Controller(gates, ControllerConfig(budget=0.25))
    optimizer = torch.optim.Adam(controller.parameters(), lr=0.05)      # and the model's, if wanted
    for batch in batches:
        (model(**batch).loss + controller.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    print(controller.finalize())        # exactly a quarter is closed; the controller is gone

While it is attached, each gate is a function of a trained logit, and the gates' own values wait.
Three methods make gates of logits:

- "hard_concrete": a noisy sigmoid, stretched beyond [0, 1] and clamped, so that it reaches both
  ends (Louizos et al., 2018); without noise in eval mode.
- "straight_through": 1 where the noisy logit is positive, else 0, with the gradient of the sigmoid;
  without noise in eval mode.
- "heuristic": the sigmoid itself. Besides, every 100 steps the logits of gates with a high
  attention entropy or a low gradient are lowered, and those of important closed gates raised.

At first all gates are open. In eval mode the first two methods then change no bit of the model;
sigmoid(3) = 0.95 does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, Self, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pliant import adapters
from pliant.adapters import Adapter, Wire, attached
from pliant.adapters.hooks import is_off
from pliant.errors import AdapterError, InvalidInput, check_choice, check_whole, named_settings
from pliant.structure.budget import Span, groups_of, spans_of
from pliant.structure.config import Kind
from pliant.structure.gates import Gates

Method = Literal["hard_concrete", "straight_through", "heuristic"]

START = 3.0
"""Of every logit: the gates are open, and the sigmoid is still steep enough to be trained."""

# Louizos et al. (2018), section 4: the temperature, and the ends of the stretched interval.
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1

# The heuristic: its thresholds, by how much it moves a logit, and where logits end.
HIGH_ENTROPY, LOW_GRADIENT, IMPORTANT = 1.5, 1e-3, 0.7
ACTIVE, NEARLY_CLOSED = 0.2, 0.1
BY_ENTROPY, BY_GRADIENT, BY_IMPORTANCE = -0.1, -0.05, 1.0
LIMIT = 10.0


@named_settings
@dataclass(frozen=True)
class ControllerConfig:
    """How many gates end closed, and how the controller finds out which."""

    budget: float = 0.25
    """The share of the gates of each kind that is closed in the end."""
    method: Method = "hard_concrete"
    """How a logit becomes a gate: "hard_concrete", "straight_through" or "heuristic"."""
    uniform: bool = False
    """Close the same share in every layer, as smaller stock checkpoints need it."""
    kv_groups: bool = False
    """One logit for all heads that share a KV head: only whole groups can be removed."""
    ramp: int = 0
    """Steps over which the budget grows to its full size."""
    rate: float = 0.05
    """How fast the penalty grows while the budget is missed."""
    every: int = 100
    """Steps between two decisions of "heuristic"."""
    seed: int = 0
    """Of the noise, which is drawn anew after each step."""
    pattern: str | None = None
    """The pattern of gates that is controlled; by default the active one."""

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(Method))
        if not 0 < self.budget < 1:
            raise InvalidInput(f"budget = {self.budget!r}: give a share of the gates, such as 0.25")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise InvalidInput(f"rate = {self.rate!r}: give a positive number")
        for name, least in (("ramp", 0), ("every", 1), ("seed", 0)):
            check_whole(name, getattr(self, name), least)


@dataclass(frozen=True)
class Decision:
    """What the rules of "heuristic" changed after a step."""

    step: int
    high_entropy: int
    """Logits that were lowered for their attention's entropy; the same below."""
    low_gradient: int
    regrown: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"After step {self.step}, the gates lowered for a high entropy: {self.high_entropy}; "
            f"for a low gradient: {self.low_gradient}; regrown: {self.regrown}."
        )


@dataclass(frozen=True)
class Rounding:
    """The gates after `finalize`."""

    gates: dict[str, int]
    """How many are controlled, by kind; the same below."""
    closed: dict[str, int]
    already_closed: int
    """Of the closed ones, those that training had closed before they were rounded."""
    units: tuple[tuple[str, int, int, int], ...]
    """The closed units: kind, layer, block of the layer, number in the block."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{closed} of {self.gates[kind]} {kind}" for kind, closed in self.closed.items()]
        return f"Closed {', '.join(parts)}; training had closed {self.already_closed} of them."


class Controller(Adapter):
    """Logits that set the gates of one pattern; `controller[kind, layer]` are those of a layer."""

    part = "structure"
    default_name = "controller"
    config_class = ControllerConfig
    why_no_export = (
        "a controller's gates are still being trained: call controller.finalize(), which closes as "
        "many as the budget says, or controller.detach()"
    )

    logits: nn.Parameter
    """All of them, one after the other: train these."""

    def __init__(self, gates: Gates | nn.Module, config: ControllerConfig | None = None) -> None:
        """Take over `gates` at once; of a model with gates, only when it is attached."""
        config = config or ControllerConfig()
        own = gates if isinstance(gates, Gates) else _gates_of(gates)
        pattern = own.active[0] if config.pattern is None else config.pattern
        super().__init__(own.base, replace(config, pattern=pattern))
        self._gates = (own,)  # in a tuple, it is no submodule
        spans = spans_of(own.sites, config.kv_groups)
        self._spans = {(span.site.kind, span.site.key): span for span in spans}
        self._groups = groups_of(spans, config.budget, config.uniform)
        device = next(own.pattern(pattern).parameters()).device
        count = max(group.stop for group in self._groups)
        self.logits = nn.Parameter(torch.full((count,), START, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=device))
        self.register_buffer("multipliers", torch.zeros(len(self._groups), 2, device=device))
        self.register_buffer("gradients", torch.zeros(count, device=device))
        self.register_buffer("backwards", torch.zeros(count, device=device))
        for name in ("entropy", "importance", "noise"):
            values = torch.full((count,), math.nan, device=device)
            self.register_buffer(name, values, persistent=False)
        self._draw()
        self.register_load_state_dict_post_hook(_draw_again)
        if isinstance(gates, Gates):
            adapters.attach(own.base, self)

    steps: Tensor
    multipliers: Tensor
    gradients: Tensor
    backwards: Tensor
    entropy: Tensor
    importance: Tensor
    noise: Tensor

    @property
    def gates(self) -> Gates:
        return self._gates[0]

    def __getitem__(self, unit: tuple[Kind, int] | tuple[Kind, int, int]) -> Tensor:
        """The logits of a layer's heads, channels, ..., as a view."""
        return self.logits[self._span(unit).slice]

    def wire(self, model: nn.Module) -> Iterator[Wire]:
        yield TakeOver(self.gates)

    # --- gates of logits -----------------------------------------------------------------------

    def gate(self, pattern: str, kind: Kind, key: str) -> Tensor | None:
        """The gates of a site in the model's forward; None where they are not controlled."""
        if pattern != self.config.pattern or is_off(self):
            return None
        span = self._spans[kind, key]
        values = self._values(span.slice)
        if self.config.method == "heuristic" and values.requires_grad:
            values.register_hook(partial(self._note_gradient, span.slice))
        return values.repeat_interleave(span.repeats) if span.repeats > 1 else values

    def _values(self, part: slice) -> Tensor:
        logits, method = self.logits[part], self.config.method
        if self.training and method != "heuristic":
            logits = logits + self.noise[part]
        if method == "hard_concrete":
            share = torch.sigmoid(logits / BETA if self.training else logits)
            return (share * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        share = torch.sigmoid(logits)
        if method == "straight_through":
            return (logits > 0).to(share.dtype) + (share - share.detach())
        return share

    def open_probability(self) -> Tensor:
        """For each logit, how likely its gate is open (for "heuristic", the gate itself)."""
        if self.config.method == "hard_concrete":
            return torch.sigmoid(self.logits - BETA * math.log(-GAMMA / ZETA))
        return torch.sigmoid(self.logits)

    def _draw(self) -> None:
        """The noise of the next step, the same in a run that is resumed there."""
        generator = torch.Generator().manual_seed(self.config.seed + 1_000_003 * int(self.steps))
        uniform = torch.rand(len(self.logits), generator=generator).clamp(1e-6, 1 - 1e-6)
        self.noise.copy_(torch.logit(uniform))

    # --- training ------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """What to add to the loss: a Lagrangian term, 0 where the budget is met."""
        excess = self._excess()
        linear, quadratic = self.multipliers.unbind(dim=1)
        return (linear * excess + quadratic * excess.square()).sum()

    def _excess(self) -> Tensor:
        """For each group, the expected share of open gates above that of the budget."""
        ramp = self.config.ramp
        phase = min(1.0, int(self.steps) / ramp) if ramp else 1.0
        probability = self.open_probability()
        shares = [
            probability[group.slice].mean() - (1 - phase * group.closed / group.count)
            for group in self._groups
        ]
        return torch.stack(shares)

    @torch.no_grad()
    def step(self) -> Decision | None:
        """Call it after each step of the optimizer; returns what the heuristic has decided."""
        excess = self._excess()
        self.multipliers += self.config.rate * torch.stack([excess, excess.square()], dim=1)
        self.steps += 1
        self._draw()
        heuristic = self.config.method == "heuristic"
        return self._decide() if heuristic and int(self.steps) % self.config.every == 0 else None

    def observe(
        self,
        *,
        entropy: Mapping[tuple[Any, ...], Tensor] | None = None,
        importance: Mapping[tuple[Any, ...], Tensor] | None = None,
    ) -> Self:
        """Measurements for the heuristic: by (kind, layer), a number for each gate.

        `entropy` is that of the heads' attention, in nats. Without `importance`, in [0, 1], a gate
        is as important as its gradient is large, beside the largest of its kind.
        """
        for values, own in ((entropy, self.entropy), (importance, self.importance)):
            for unit, measured in (values or {}).items():
                span = self._span(unit)
                gates = span.count * span.repeats
                if measured.shape != (gates,):
                    raise InvalidInput(
                        f"{unit}: shape {list(measured.shape)}, and there are {gates} gates"
                    )
                own[span.slice] = measured.detach().to(own).view(-1, span.repeats).mean(dim=1)
        return self

    def _note_gradient(self, part: slice, gradient: Tensor) -> None:
        self.gradients[part] += gradient.detach().abs()
        self.backwards[part] += 1

    def _decide(self) -> Decision:
        for sums in (self.gradients, self.backwards):
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(sums)
        gradient = self.gradients / self.backwards  # NaN, which no rule meets, where there was none
        importance = torch.where(self.importance.isnan(), self._relative(gradient), self.importance)
        gate = torch.sigmoid(self.logits)
        rules = {
            BY_ENTROPY: (self.entropy > HIGH_ENTROPY) & (gate > ACTIVE),
            BY_GRADIENT: (gradient < LOW_GRADIENT) & (gate > ACTIVE),
            BY_IMPORTANCE: (importance > IMPORTANT) & (gate < NEARLY_CLOSED),
        }
        for change, applies in rules.items():
            self.logits.data += change * applies.to(self.logits.dtype)
        self.logits.clamp_(-LIMIT, LIMIT)
        self.gradients.zero_()
        self.backwards.zero_()
        return Decision(int(self.steps), *(int(applies.sum()) for applies in rules.values()))

    def _relative(self, gradient: Tensor) -> Tensor:
        """Beside the largest of the group."""
        relative = torch.zeros_like(gradient)
        for group in self._groups:
            own = gradient[group.slice].nan_to_num()
            relative[group.slice] = own / own.max().clamp(min=1e-12)
        return relative

    @torch.no_grad()
    def finalize(self) -> Rounding:
        """Set the gates to 0 and 1, exactly as many as the budget says, and detach.

        In each group those with the lowest logits are closed.
        """
        closed = torch.zeros(len(self.logits), dtype=torch.bool, device=self.logits.device)
        for group in self._groups:
            lowest = self.logits[group.slice].argsort(stable=True)[: group.closed]
            closed[group.start + lowest] = True
        already = int((closed & (self.open_probability() < 0.5)).sum())
        gates: dict[str, int] = {}
        shut: dict[str, int] = {}
        units: list[tuple[str, int, int, int]] = []
        pattern = self.gates.pattern(self.config.pattern)
        for (kind, key), span in self._spans.items():
            own = closed[span.slice].repeat_interleave(span.repeats)
            pattern[kind, key].copy_((~own).to(torch.float32))
            gates[kind] = gates.get(kind, 0) + len(own)
            shut[kind] = shut.get(kind, 0) + int(own.sum())
            numbers = own.nonzero().flatten().tolist()
            units += [(kind, span.site.layer, span.site.block, number) for number in numbers]
        self.detach()
        return Rounding(gates, shut, already, tuple(units))

    def _span(self, unit: tuple[Any, ...]) -> Span:
        kind, layer, *block = unit
        key = f"{layer}_{block[0]}" if block and block[0] else str(layer)
        self.gates.pattern(self.config.pattern)[kind, key]  # says what there is, if not this
        return self._spans[kind, key]


@dataclass(frozen=True, eq=False)
class TakeOver:
    """Makes gates ask the controller for their values, while it is attached."""

    gates: Gates

    def connect(self, adapter: nn.Module) -> Self:
        assert isinstance(adapter, Controller)
        if self.gates.controlled_by is not None:
            raise AdapterError("these gates have a controller already: finalize or detach it first")
        self.gates.controlled_by = adapter.gate
        return self

    def remove(self) -> None:
        self.gates.controlled_by = None


def _gates_of(model: nn.Module) -> Gates:
    every = [adapter for adapter in attached(model).values() if isinstance(adapter, Gates)]
    if len(every) != 1:
        raise AdapterError(
            f"a controller needs gates to control, and {type(model).__name__} has {len(every)} of "
            "them attached: attach exactly one before you load the controller"
        )
    return every[0]


def _draw_again(controller: Any, incompatible: Any) -> None:
    controller._draw()
