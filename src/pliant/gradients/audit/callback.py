"""Under a Trainer: the audit and the race at the start of a training, on its own data; and,
with `auto`, training by the winner.

    make_selective(trainer, GradientConfig())
    trainer.add_callback(AuditCallback(auto=True))
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pliant.errors import InvalidInput
from pliant.gradients.audit.audit import DRAWS, TURNS, Audit, audit
from pliant.gradients.audit.contenders import rows_in, same_randomness
from pliant.gradients.audit.race import SEEDS, race
from pliant.gradients.audit.result import Race
from pliant.gradients.config import GradientConfig
from pliant.gradients.model import OFF, Gradients, GradientsWarning, all_attached_to
from pliant.training.terminal import Say


class AuditCallback(TrainerCallback):
    """Measures before the first step; a resumed training keeps its first decision.

    With `auto`, training goes on as the winner: its rule and engine, or all tokens where standard
    training or a smaller batch won. The results are in `.audit` and `.race`.
    """

    def __init__(
        self,
        config: GradientConfig | None = None,
        *,
        auto: bool = False,
        seconds: float = 20.0,
        steps: int | None = None,
        seeds: int = SEEDS,
        batches: int = 4,
        held_out: int = 64,
        draws: int = DRAWS,
        turns: int = TURNS,
        say: Say = print,
    ) -> None:
        self.config, self.auto, self.say = config, auto, say
        self.budget: dict[str, Any] = {"seconds": seconds} if steps is None else {"steps": steps}
        self.seeds, self.batches, self.held_out = seeds, batches, held_out
        self.draws, self.turns = draws, turns
        self.audit: Audit | None = None
        self.race: Race | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        model = event["model"]
        if state.global_step > 0:
            return
        if args.world_size > 1:
            raise InvalidInput(
                "the audit runs in one process: run it there, and apply its recommendation"
            )
        gradients = _attached(model)
        if self.auto and gradients is None:
            raise InvalidInput("nothing to switch is attached: make_selective(trainer, ...) first")
        rows, collate = _rows_of(event.get("train_dataloader"), args.seed)
        with same_randomness(model):  # a collator may draw, too
            self._measure(model, args, gradients, rows, collate)
        if self.auto:
            assert gradients is not None and self.race is not None
            self._act(gradients, self.race)

    def _measure(
        self,
        model: nn.Module,
        args: TrainingArguments,
        gradients: Gradients | None,
        rows: Sequence[Any],
        collate: Callable[..., Any],
    ) -> None:
        config = self.config or GradientConfig() if gradients is None else gradients.config
        router = None if gradients is None else gradients.selector.router
        held, size = max(1, min(self.held_out, len(rows) // 4)), args.per_device_train_batch_size
        train, rest = rows[held:], rows[:held]
        batches = [collate(list(train[i : i + size])) for i in range(0, size * self.batches, size)]
        batches = [batch for batch in batches if rows_in(batch)]
        self.audit = audit(
            model, batches, config, draws=self.draws, turns=self.turns, router=router
        )
        self.say(self.audit.sentence)
        self.race = race(
            model,
            train,
            rest,
            config,
            seeds=self.seeds,
            batch_size=size,
            lr=args.learning_rate,
            collate=collate,
            turns=self.turns,
            router=router,
            **self.budget,
        )
        self.say(self.race.sentence)

    def _act(self, gradients: Gradients, race: Race) -> None:
        winner = race.winner.contender
        to = winner.config if winner.config is not None else OFF
        if winner == race.runs[0].contender:
            self.say(f"This training goes on as it was set: {winner.name}.")
            return  # with its own schedule, too
        gradients.switch(to)
        if winner.config is not None:
            self.say(f"This training goes on by {winner.name}.")
        elif winner.kind == "standard":
            self.say("This training goes on with every token: selection is switched off.")
        else:
            self.say(
                "This training goes on with every token: selection is switched off. The batch "
                f"stays as large as it was set; what won is {winner.name}."
            )


class _Rows(Sequence[Any]):
    """A data set's rows in another order; each is made when it is asked for."""

    def __init__(self, data: Any, order: list[int]) -> None:
        self.data, self.order = data, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return _Rows(self.data, self.order[at])
        return self.data[self.order[at]]


def _rows_of(loader: Any, seed: int) -> tuple[_Rows, Callable[..., Any]]:
    data = getattr(loader, "dataset", None)
    if data is None or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise InvalidInput(
            "the audit draws rows at random, and this data set only streams: give one with a "
            "length, or audit some batches of it, pliant.gradients.audit.audit(model, batches)"
        )
    if len(data) < 4:
        raise InvalidInput(f"{len(data)} rows are too few to train and to be measured on")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    return _Rows(data, order), loader.collate_fn


def _attached(model: nn.Module) -> Gradients | None:
    attached = all_attached_to(model)
    if len(attached) > 1:
        warnings.warn(
            f"{len(attached)} are attached: the first is audited", GradientsWarning, stacklevel=3
        )
    return attached[0] if attached else None
