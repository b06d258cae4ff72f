"""The cycle of plasticity: heads are pruned, the model trains, and some of them grow again.

    gates = attach(model)
    plasticity = attach_plasticity(gates, PlasticityConfig(prune=0.5, regrow=0.1))
    plasticity.measure_on(batches, held_out)
    for batch in training:                  # `make_plastic` makes transformers' Trainer do this
        plasticity.begin_step()
        model(**batch).loss.backward()
        plasticity.before_update()
        optimizer.step()
        plasticity.after_update()
        optimizer.zero_grad()
    plasticity.begin_step()
    print(plasticity.result())
    plasticity.fold()

A closed head's gate is 0, and its weights stay in the base, bit for bit: entries of the layer's
attention that have no gradient at all are restored after each update, since weight decay and the
optimizer's momentum would move them. (Keys and values that an open head shares are trained with
it.) A regrown head begins with these weights and with its gate at 0, so that no loss jumps, and the
gate opens over some steps. From then on what it learns in the output projection is a parameter
beside the base, in a parameter group of its own; `fold` adds it to the base in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from pliant import adapters
from pliant.adapters import Adapter, After, Wire, attached
from pliant.anatomy import Anatomy
from pliant.anatomy.find import device_of
from pliant.errors import AdapterError, InvalidInput, UnsupportedModel
from pliant.structure.agency import Agency
from pliant.structure.calibration import Batch, Sample, samples_of
from pliant.structure.gates import Gates, gates_on_heads
from pliant.structure.plasticity.config import PlasticityConfig, SleepConfig
from pliant.structure.plasticity.growth import Head, head_sites, mean_loss, ranked
from pliant.structure.plasticity.heads import CLOSED, OPEN, REGROWN, HeadStates
from pliant.structure.plasticity.held import Held, refuse_compensated_heads
from pliant.structure.plasticity.report import Phase, PhaseRow, PlasticityResult
from pliant.structure.plasticity.sleep import merger_plans
from pliant.structure.ranking.importance import ImportanceConfig, importance
from pliant.structure.units import sites_of

GROUP = "regrown"
"""The name of the parameter group of regrown heads."""


def attach_plasticity(
    gates: Gates, config: PlasticityConfig | None = None, name: str | None = None
) -> Plasticity:
    """A cycle for the heads that `gates` scale, in their active pattern; nothing changes yet."""
    config = replace(config or PlasticityConfig(), gates=gates.name, pattern=gates.active[0])
    return adapters.attach(gates.base, Plasticity(gates.base, config), name)


class Plasticity(Adapter):
    """The state of the cycle, and what regrown heads have learned."""

    part = "structure"
    default_name = "plasticity"
    config_class = PlasticityConfig
    why_no_export = (
        "what its regrown heads have learned lies beside the base: call fold(), which adds it to "
        "the base's weights"
    )

    def __init__(self, model: nn.Module, config: PlasticityConfig) -> None:
        super().__init__(model, config)
        sites = sites_of(Anatomy.of(model), ["heads"])
        self.sites = nn.ModuleDict({site.key: HeadStates(site) for site in sites})
        total = sum(site.count for site in sites)
        slots = min(total, config.cycles * round(config.regrow * total))
        outputs = Anatomy.of(model).hidden_size
        width = max(site.width for site in sites)
        device = device_of(model)
        self.learned = nn.ParameterList(
            [nn.Parameter(torch.zeros(outputs, width, device=device)) for _ in range(slots)]
        )
        """For each head that has grown again, what is added to its slice of the output weights."""
        self.steps = 0
        self.done = 0
        """How many of the cycle's events have happened."""
        self.rows: list[PhaseRow] = []
        self.regrown: list[Head] = []
        self.merged: list[tuple[str, int, int]] = []
        self._calibration: tuple[list[Batch], list[Sample], list[Sample]] | None = None
        self._held = Held()

    @property
    def gates(self) -> Gates:
        """The gates that the cycle sets."""
        gates = gates_on_heads(self.base, self.config.gates, "Plasticity")
        if gates.active != (self.config.pattern,):
            raise AdapterError(
                f"the active pattern is {gates.active}, and the cycle is that of "
                f"{self.config.pattern!r}: call gates.use({self.config.pattern!r})"
            )
        return gates

    def wire(self, model: nn.Module) -> Iterator[Wire]:
        refuse_compensated_heads(model)
        gates = self.gates
        closed = 0
        for site in head_sites(gates):
            gate = gates.pattern()["heads", site.key].detach()
            self._states(site.key).take(gate)
            closed += int((gate == 0).sum())
            yield After(site.module, partial(self._add_learned, site.key, site.width))
        self._check_counts(closed)

    def _add_learned(
        self, key: str, width: int, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))  # already times the gates
        for head, slot in self._states(key).slots():
            own = x[..., head * width : (head + 1) * width]
            weight = self.learned[slot][: output.shape[-1], :width]
            output = output + F.linear(own, weight.to(own))
        return output

    # --- training ------------------------------------------------------------------------------

    def measure_on(self, batches: Sequence[Batch], held_out: Sequence[Batch]) -> None:
        """Measure heads on `batches` and the rows' losses on `held_out`."""
        device = device_of(self.anatomy.embeddings)
        samples, held = samples_of(batches, device), samples_of(held_out, device)
        if not samples or not held:
            what = "calibration" if not samples else "held-out"
            raise InvalidInput(f"there is no {what} text: give batches with input_ids")
        self._calibration = list(batches), samples, held

    def own_group(self, optimizer: Optimizer, rate: float) -> None:
        """Move what regrown heads learn to a parameter group of its own; `rate` is the learning
        rate of everything else."""
        if not len(self.learned) or any(g.get("name") == GROUP for g in optimizer.param_groups):
            return
        own = {id(parameter) for parameter in self.learned}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in own]
        optimizer.add_param_group(
            {
                "params": list(self.learned),
                "lr": rate * self.config.rate,
                "weight_decay": 0.0,  # it would pull them back to what was kept
                "name": GROUP,
            }
        )

    def begin_step(self) -> None:
        """Call it before each step, and once after the last: prune or regrow if it is time."""
        for step, event in self._plan()[self.done :]:
            if step > self.steps:
                return
            event()
            self.done += 1

    @torch.no_grad()
    def before_update(self) -> None:
        """Call it after the backward pass, before the optimizer's step."""
        self._held = Held()
        for site in head_sites(self.gates):
            states = self._states(site.key)
            if bool((states.state != OPEN).any()):
                regrown = (states.state == REGROWN).nonzero().flatten().tolist()
                self._held.hold_attention(self.anatomy, site, regrown)
        for parameter in self.learned:
            self._held.hold(parameter)

    @torch.no_grad()
    def after_update(self) -> None:
        """Call it after the optimizer's step: closed heads are as they were, gates open further."""
        self._held.restore()
        self.steps += 1
        gates = self.gates
        for key in self.sites:
            states, gate = self._states(key), gates.pattern()["heads", key]
            age = self.steps - states.since
            warm = (states.state == REGROWN) & (age <= self.config.warmup)
            share = (age / self.config.warmup).clamp(0, 1)
            gate[states.state == CLOSED] = 0
            gate[warm] = (states.gate * share)[warm].to(gate)

    # --- the cycle's events --------------------------------------------------------------------

    def _plan(self) -> list[tuple[int, Callable[[], None]]]:
        """After how many steps each event happens."""
        config, plan = self.config, []
        length = config.adapt + config.learn
        for cycle in range(config.cycles):
            plan.append((cycle * length, partial(self._prune, cycle)))
            plan.append((cycle * length + config.adapt, partial(self._regrow, cycle)))
        return [*plan, (config.steps, partial(self._note, config.cycles, "learned"))]

    def _prune(self, cycle: int) -> None:
        self._note(cycle or 1, "learned" if cycle else "before")
        batches, samples, _ = self._texts()
        if self.config.sleep:
            self._sleep(samples)
            self._note(cycle + 1, "slept")
        heads = self._heads()
        target = round(self.config.prune * len(heads))
        count = target - sum(state == CLOSED for state in heads.values())
        if count > 0:
            config = ImportanceConfig(("heads",), self.config.score, self.config.seed + cycle)
            scores = importance(self.base, batches, config).units["heads"]
            candidates = [head for head, state in heads.items() if state != CLOSED]
            candidates.sort(key=lambda head: float(scores[head[0]][head[1]]))
            for head in candidates[:count]:
                self._close(head)
        self._note(cycle + 1, "pruned")

    @torch.no_grad()
    def _sleep(self, samples: Sequence[Sample]) -> None:
        """Merge heads that write nearly the same; not those that have learned beside the base."""
        config = SleepConfig(self.config.sleep, negligible=0, take_over="gate")
        open_ = {
            key: torch.tensor(
                [
                    state == OPEN and not self._is_locked((key, number))
                    for number, state in enumerate(self._states(key).state.tolist())
                ]
            )
            for key in self.sites
        }
        for plan in merger_plans(self.gates, samples, config, open_):
            gate = self.gates.pattern()["heads", plan.site.key]
            gate.mul_(plan.factors.to(gate))
            for merger in plan.merged:
                self._close((merger.site, merger.closed))
                self.merged.append((merger.site, merger.closed, merger.into))

    def _regrow(self, cycle: int) -> None:
        self._note(cycle + 1, "adapted")
        heads = self._heads()
        count = round(self.config.regrow * len(heads))
        if not count:
            return
        batches, samples, _ = self._texts()
        closed = [head for head, state in heads.items() if state == CLOSED]
        closed = [head for head in closed if not self._is_locked(head)]
        config = self.config
        seed = config.seed + cycle
        order = ranked(self.gates, closed, config.growth, batches, samples, seed)
        for head in order[:count]:
            self._open(head)
        self._note(cycle + 1, "regrown")

    @torch.no_grad()
    def _close(self, head: Head) -> None:
        key, number = head
        gate = self.gates.pattern()["heads", key]
        self._states(key).close(number, float(gate[number]))
        gate[number] = 0

    def _open(self, head: Head) -> None:
        """Its gate is still 0, and opens with the steps to come."""
        key, number = head
        used = sum(len(self._states(k).slots()) for k in self.sites)
        self._states(key).regrow(number, self.steps, used)
        self.regrown.append(head)

    def _note(self, cycle: int, phase: Phase) -> None:
        _, _, held_out = self._texts()
        model = self.gates.base  # checks that they are there, with the cycle's pattern
        opened = sum(state != CLOSED for state in self._heads().values())
        loss = mean_loss(model, held_out)
        self.rows.append(PhaseRow(cycle, phase, self.steps, loss, opened))

    def _texts(self) -> tuple[list[Batch], list[Sample], list[Sample]]:
        if self._calibration is None:
            raise InvalidInput(
                "there is nothing to measure on: call measure_on or make_plastic before"
            )
        return self._calibration

    def _heads(self) -> dict[Head, int]:
        """The state of every head."""
        return {
            (key, number): state
            for key in self.sites
            for number, state in enumerate(self._states(key).state.tolist())
        }

    def _states(self, key: str) -> HeadStates:
        states = self.sites[key]
        assert isinstance(states, HeadStates)
        return states

    def _is_locked(self, head: Head) -> bool:
        """Whether an Agency on these gates has withdrawn it, or has no consent."""
        key, number = head
        agencies = [a for a in attached(self.base).values() if isinstance(a, Agency)]
        return any(
            bool(agency.locked(key)[number])
            for agency in agencies
            if agency.config.gates == self.config.gates
        )

    def _check_counts(self, closed: int) -> None:
        total = len(self._heads())
        target, regrow = round(self.config.prune * total), round(self.config.regrow * total)
        if target <= closed == 0:
            raise InvalidInput(
                f"prune = {self.config.prune} closes none of {total} heads, and all are open"
            )
        if target == total:
            raise InvalidInput(f"prune = {self.config.prune} closes all {total} heads")
        if self.config.regrow and not 0 < regrow <= max(target, closed):
            raise InvalidInput(
                f"regrow = {self.config.regrow} opens {regrow} of {total} heads, and "
                f"{max(target, closed)} are closed by then: give a share that opens some of these"
            )

    # --- the end -------------------------------------------------------------------------------

    def result(self) -> PlasticityResult:
        """The rows so far; complete after `config.steps` steps and a last `begin_step`."""
        if not self.rows:
            raise InvalidInput("the cycle has not begun: train first")
        return PlasticityResult(
            self.config,
            len(self._heads()),
            tuple(self.rows),
            tuple(self.regrown),
            tuple(self.merged),
        )

    @torch.no_grad()
    def fold(self) -> PlasticityResult:
        """Add what regrown heads have learned to the base's weights, and detach."""
        result, folded = self.result(), []
        for site in head_sites(self.gates):
            for head, slot in self._states(site.key).slots():
                weight = getattr(site.module, "weight", None)
                if type(weight) is not nn.Parameter or not weight.is_floating_point():
                    raise UnsupportedModel(
                        f"the output projection of layer {site.layer} has no plain weights to add "
                        "to: merge its LoRA or load the model in 16 or 32 bits"
                    )
                folded.append((weight, site, head, self.learned[slot]))
        for weight, site, head, learned in folded:
            own = weight.narrow(site.axis, head * site.width, site.width)
            learned_OW = learned[: weight.shape[1 - site.axis], : site.width].to(own)
            own.add_(learned_OW if site.axis == 1 else learned_OW.T)
        self.detach()
        return result

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "done": self.done,
            "rows": [asdict(row) for row in self.rows],
            "regrown": [list(head) for head in self.regrown],
            "merged": [list(merger) for merger in self.merged],
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.steps, self.done = state["steps"], state["done"]
        self.rows = [PhaseRow(**row) for row in state["rows"]]
        self.regrown = [(key, number) for key, number in state["regrown"]]
        self.merged = [(key, gone, into) for key, gone, into in state.get("merged", ())]
