"""Agency: each head has a state, which multiplies its gate, and a consent that locks it.

    gates = attach(model)
    agency = attach_agency(gates)
    for batch in batches:
        agency.observe(batch)                   # measures each head; its state may follow
    agency.set_head_state(3, 5, "withdrawn")    # by hand, and back again
    print(agency.get_agency_report())

A head is *active* (its gate counts fully), *overloaded* (half: it attends to few positions again
and again), *misaligned* (.7: what it contributes points against the loss) or *withdrawn* (0). A
head without consent counts for 0 whatever its state is and whoever writes to its gate, until
`set_head_state(..., consent=True)`. Nothing is measured in the model's forward: `observe` runs a
forward and a backward pass of its own. The gates keep their values, so every state is reversible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from pliant import adapters
from pliant.adapters import Adapter, Before, Wire
from pliant.anatomy import Anatomy
from pliant.errors import InvalidInput, check_choice, did_you_mean
from pliant.structure.agency.heads import Heads
from pliant.structure.agency.measure import measure
from pliant.structure.agency.report import (
    STATES,
    AgencyReport,
    HeadReport,
    State,
    Transition,
    Violation,
)
from pliant.structure.config import AgencyConfig
from pliant.structure.gates import Gates, gates_on_heads
from pliant.structure.scaling import scaling
from pliant.structure.units import Site, sites_of

Gate = tuple[str, str, int]
"""A pattern, the key of a site, and the number of a head in it."""


def attach_agency(gates: Gates, config: AgencyConfig | None = None, name: str = "agency") -> Agency:
    """States for the heads that `gates` scale, all active and with consent."""
    config = replace(config or AgencyConfig(), gates=gates.name)
    return adapters.attach(gates.base, Agency(gates.base, config), name)


class Agency(Adapter):
    """The states of heads, beside the gates of the same model."""

    part = "structure"
    config_class = AgencyConfig
    retired_tensors = r"heads\.\w+\.gate"  # of one pattern only; `_locked_gates` replaced it

    def __init__(self, model: nn.Module, config: AgencyConfig) -> None:
        super().__init__(model, config)
        sites = sites_of(Anatomy.of(model), ["heads"])
        self.heads = nn.ModuleDict({site.key: Heads(site) for site in sites})
        self.observations = 0
        self.transitions: list[Transition] = []
        self.violations: list[Violation] = []
        self._locked_gates: dict[Gate, float] = {}
        """What the gates of locked heads were in each pattern when they were last looked at."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, model: nn.Module, source: str | Path, *, name: str | None = "agency", **options: Any
    ) -> Self:
        """Load saved states and attach them to `model`, where their gates are attached already."""
        return super().from_pretrained(model, source, name=name, **options)

    @property
    def gates(self) -> Gates:
        """The gates whose heads have states."""
        return gates_on_heads(self.base, self.config.gates, "Agency")

    def wire(self, model: nn.Module) -> Iterator[Wire]:
        yield Before(self.anatomy.decoder, self._enter_decoder)
        for site in _sites(self.gates):
            yield from scaling(site, partial(self._weight, site.key))

    def _enter_decoder(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.in_place():
            self.rewire()

    def _weight(self, key: str, like: Tensor) -> Tensor:
        return self._heads(key).weight.to(like.dtype)

    # --- by hand -------------------------------------------------------------------------------

    def set_head_state(
        self,
        layer: int,
        head: int,
        state: State,
        consent: bool | None = None,
        *,
        block: int = 0,
        reason: str = "set_head_state",
    ) -> bool:
        """Set a head's state and, unless it is None, its consent; returns whether that was done.

        Without consent a head can only be withdrawn. Anything else is refused and counted as a
        violation, unless this call gives the consent. `block` is the attention block, in layers
        with several.
        """
        check_choice("state", state, STATES)
        heads = self._heads(_key(layer, block), head)
        if consent is None:
            consent = bool(heads.consent[head])
            if not consent and state != "withdrawn":
                self._violate(layer, block, head, f"{reason}: {state!r} was refused")
                return False
        self._change(layer, block, head, state, consent, reason)
        return True

    @torch.no_grad()
    def set_gate(self, layer: int, head: int, value: float, *, block: int = 0) -> bool:
        """Write a head's gate, as controllers should; returns whether that was done.

        A write to a head that is withdrawn or without consent is refused and counted as a
        violation. (A direct write to `gates` cannot be refused; it has no effect on such a head,
        and the next `observe` counts it.)
        """
        if self._heads(_key(layer, block), head).locked[head]:
            self._violate(layer, block, head, f"set_gate: {value:.3g} was refused")
            return False
        self.gates["heads", layer, block][head] = value
        return True

    def locked(self, key: str) -> Tensor:
        """Which heads of a site are withdrawn or without consent: no controller may open them."""
        return self._heads(key).locked

    def get_agency_report(self) -> AgencyReport:
        """The state of every head, and every transition and violation so far."""
        heads = [h for key in self.heads for h in self._heads(key).report(*_place(key))]
        return AgencyReport(
            self.observations, tuple(heads), tuple(self.transitions), tuple(self.violations)
        )

    def summary(self) -> str:
        return str(self.get_agency_report())

    # --- measured ------------------------------------------------------------------------------

    def observe(self, batch: Mapping[str, Any]) -> tuple[Transition, ...]:
        """Measure every head on a batch, change states as `config` says, and return the changes.

        `batch` holds the model's inputs: input_ids and, if there is padding, attention_mask; of
        `labels` those that are -100 do not count. This runs one forward with eager attention and
        one backward, in eval mode, and leaves no gradient behind. Locked heads stay as they are.
        """
        measured = measure(self.gates, _sites(self.gates), batch)
        self.observations += 1
        begin = len(self.transitions)
        for key, (utilisation, derivative) in measured.items():
            self._heads(key).observe(utilisation, derivative, self.config)
            self._find_writes(key)
            self._follow(key)
        return tuple(self.transitions[begin:])

    def _find_writes(self, key: str) -> None:
        """Count the gates of locked heads, in any pattern, that somebody has raised since."""
        for head in self._heads(key).locked.nonzero().flatten().tolist():
            for pattern, now in self._gates_of(key, head).items():
                # A pattern that was added after the lock is seen here for the first time.
                before = self._locked_gates.setdefault((pattern, key, head), now)
                if now > max(before, self.config.violation):
                    where = f" in pattern {pattern!r}" if len(self.gates.patterns) > 1 else ""
                    raised = f"raised from {before:.3g} to {now:.3g}{where}"
                    self._violate(*_place(key), head, f"its gate was {raised}, without effect")
                    self._locked_gates[pattern, key, head] = now

    def _gates_of(self, key: str, head: int) -> dict[str, float]:
        """A head's gate in each pattern."""
        names = self.gates.config.patterns
        return {
            name: float(self.gates.pattern(name)["heads", key].detach()[head]) for name in names
        }

    def _remember_gates(self, key: str, head: int, was_locked: bool) -> None:
        """Note the gates of a head that is locked now, and forget those of one that is not."""
        is_locked = bool(self._heads(key).locked[head])
        for pattern, now in self._gates_of(key, head).items():
            if not is_locked:
                self._locked_gates.pop((pattern, key, head), None)
            elif not was_locked:
                self._locked_gates[pattern, key, head] = now

    def _follow(self, key: str) -> None:
        """The transitions of one site's heads, except those that are locked."""
        heads = self._heads(key)
        locked, waited = heads.locked.tolist(), heads.overloaded_for.tolist()
        for now in heads.report(*_place(key)):
            if locked[now.head]:
                continue
            after, reason = self._next(now, waited[now.head])
            if after != now.state:
                self._change(now.layer, now.block, now.head, after, True, reason)

    def _next(self, now: HeadReport, waited: int) -> tuple[State, str]:
        """The state that follows, and why."""
        config, against, used = self.config, now.misalignment, now.utilisation
        if now.state == "misaligned":
            if against <= 0:
                return "active", f"misalignment {against:.2f} is no longer above 0"
        elif self.observations >= config.warmup and against > config.misalignment:
            return "misaligned", f"misalignment {against:.2f} is above {config.misalignment}"
        elif now.state == "active" and used > config.overload:
            return "overloaded", f"utilisation {used:.2f} is above {config.overload}"
        elif now.state == "overloaded" and waited >= config.recovery:
            return "active", f"{waited} observations have passed"
        return now.state, ""

    # --- records -------------------------------------------------------------------------------

    def _change(
        self, layer: int, block: int, head: int, state: State, consent: bool, reason: str
    ) -> None:
        key = _key(layer, block)
        heads = self._heads(key)
        before, had_consent = STATES[int(heads.state[head])], bool(heads.consent[head])
        was_locked = bool(heads.locked[head])
        heads.set(head, state, consent)
        self._remember_gates(key, head, was_locked)
        if (before, had_consent) != (state, consent):
            record = (layer, block, head, before, state, consent, reason)
            self.transitions.append(Transition(self.observations, *record))

    def _violate(self, layer: int, block: int, head: int, reason: str) -> None:
        self.violations.append(Violation(self.observations, layer, block, head, reason))

    def _heads(self, key: str, head: int = 0) -> Heads:
        if key not in self.heads:
            raise InvalidInput(f"layer {key} has no heads{did_you_mean(key, self.heads)}")
        heads = self.heads[key]
        assert isinstance(heads, Heads)
        if not 0 <= head < len(heads.state):
            raise InvalidInput(f"layer {key} has no head {head}: it has {len(heads.state)}")
        return heads

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "observations": self.observations,
            "transitions": [asdict(transition) for transition in self.transitions],
            "violations": [asdict(violation) for violation in self.violations],
            "locked_gates": [[*gate, value] for gate, value in self._locked_gates.items()],
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.observations = state["observations"]
        self.transitions = [Transition(**transition) for transition in state["transitions"]]
        self.violations = [Violation(**violation) for violation in state["violations"]]
        self._locked_gates = {
            (pattern, key, head): value
            for pattern, key, head, value in state.get("locked_gates", ())
        }


def _sites(gates: Gates) -> list[Site]:
    return [site for site in gates.sites if site.kind == "heads"]


def _key(layer: int, block: int) -> str:
    return f"{layer}_{block}" if block else str(layer)


def _place(key: str) -> tuple[int, int]:
    """The layer and the block of a site's key."""
    layer, _, block = key.partition("_")
    return int(layer), int(block or 0)
