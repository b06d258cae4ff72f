"""`pliant train lm`: a language model trained in a folder, on all tokens or on some of them.

The engine "auto" decides which: a short race at the start, on the run's own data. What it decided
is in the run's record and in every checkpoint, so a resumed run never races again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from pliant.data.collate import Collator
from pliant.errors import InvalidInput, PliantError
from pliant.gradients.audit.callback import AuditCallback
from pliant.gradients.config import GradientConfig
from pliant.gradients.model import OFF, Gradients
from pliant.gradients.training import PREFIX, attached_to, make_selective
from pliant.training.arguments import training_arguments
from pliant.training.folder import RECORD, read_record
from pliant.training.result import TrainingResult
from pliant.training.run import TrainingRun, save_stock_model, with_lora
from pliant.training.terminal import Say, print_to_stderr
from pliant.training.texts import Texts

AUTO = "auto"
MIN_STEPS = 1000
"""A race takes half a minute: a shorter training trains as usual."""
RACE_SECONDS, RACE_SEEDS = 3.0, 3
"""Of each contender in each race: half a minute in all."""


@dataclass(frozen=True)
class Plan:
    """Everything that the losses of a run depend on, apart from the machine."""

    model: str
    data: str
    content: str
    """The digest of the texts."""
    config: dict[str, Any]
    settings: dict[str, str]
    lora: int | None
    dtype: str
    auto: bool = False
    """Whether a race decides if `config` is worth it."""


@dataclass(frozen=True)
class SelectiveResult(TrainingResult):
    """With what was trained; the operations are of the part since the run was resumed."""

    tokens: float
    trained: float
    flops_of_standard: float | None
    engine: str

    def cells(self) -> list[list[str]]:
        share = f"{self.trained:,.0f} ({self.trained / max(1, self.tokens):.1%})"
        cells = [["engine", self.engine], *super().cells(), ["tokens", f"{self.tokens:,.0f}"]]
        cells.append(["of these trained", share])
        if self.flops_of_standard is not None:
            cells.append(
                ["operations, of training every token (counted)", f"{self.flops_of_standard:.0%}"]
            )
        return cells


def train_lm(
    model: Any,
    tokenizer: Any,
    texts: Texts,
    folder: Path,
    plan: Plan,
    *,
    evaluation: Texts | None = None,
    resume: bool = False,
    say: Say = print_to_stderr,
) -> SelectiveResult:
    """Train `model` on `texts`, or resume that; write the trained model into `folder`."""
    args = training_arguments(folder, plan.settings)
    record = read_record(folder) if resume else None
    if record is not None and "auto" not in record["plan"]:  # it began before there was a choice
        plan = replace(plan, auto=False)
    config = GradientConfig(**plan.config)
    if record is not None:
        plan = replace(plan, config=_with_retired(plan.config, record["plan"].get("config", {})))
    run = TrainingRun(args, asdict(plan), resume=resume, say=say)
    use_cache = model.config.use_cache

    def build() -> Trainer:
        return Trainer(
            model if plan.lora is None else with_lora(model, plan.lora, args.seed),
            args,
            data_collator=Collator.of(tokenizer),
            train_dataset=texts.pieces,
            eval_dataset=evaluation.pieces if evaluation else None,
        )

    def prepare(trainer: Trainer) -> None:
        gradients = make_selective(trainer, config)
        if plan.auto:
            trainer.add_callback(EngineChoice(run, gradients))

    trainer = run.train(build, prepare, _share_trained)
    eval_loss = trainer.evaluate()["eval_loss"] if evaluation else None
    gradients = attached_to(trainer.model)
    assert gradients is not None
    result = _result(run, trainer, gradients, eval_loss)
    gradients.detach()
    trainer.model.config.use_cache = use_cache
    if args.should_save:
        save_stock_model(trainer.model, tokenizer, folder)
    run.note(ended=result.as_dict())
    return result


def _with_retired(config: dict[str, Any], before: Any) -> dict[str, Any]:
    """The plan of a run that an earlier version began also names the settings that did nothing."""
    if not isinstance(before, dict):
        return config  # an edited record, which the run refuses as another plan
    retired = {k: v for k, v in GradientConfig.RETIRED.items() if before.get(k) == v}
    return {**config, **retired}


class EngineChoice(AuditCallback):
    """Races selective training against training as usual before the first step, and goes on as the
    winner."""

    def __init__(self, run: TrainingRun, gradients: Gradients) -> None:
        super().__init__(
            auto=True,
            seconds=RACE_SECONDS,
            seeds=RACE_SEEDS,
            batches=1,
            held_out=32,
            draws=2,
            turns=3,
            say=run.say,
        )
        self.run, self.gradients = run, gradients

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        if state.global_step > 0:
            return  # the checkpoint has restored the choice
        if (choice := self.run.record.get("choice")) is not None:
            self.gradients.switch(self._recorded(choice))
            return
        if why := self._why_not_raced(args, state):
            self._train_as_usual(why)
        else:
            try:
                super().on_train_begin(args, state, control, **event)
                why = self.race.sentence if self.race is not None else ""
            except PliantError as error:
                self._train_as_usual(why := f"the race could not be run ({error})")
        self.run.note(choice={"config": asdict(self.gradients.acting), "why": why})

    def _recorded(self, choice: Any) -> GradientConfig:
        try:
            return GradientConfig(**choice["config"])
        except (KeyError, TypeError) as error:
            raise InvalidInput(
                f"{self.run.folder / RECORD}: its choice is damaged; give another folder"
            ) from error

    def _why_not_raced(self, args: TrainingArguments, state: TrainerState) -> str:
        if args.world_size > 1:
            return f"{args.world_size} processes train together, and the race runs in one"
        if state.max_steps < MIN_STEPS:
            return f"{state.max_steps} steps are too few for a race to pay ({MIN_STEPS:,} or more)"
        return ""

    def _train_as_usual(self, why: str) -> None:
        self.gradients.switch(OFF)
        if self.run.args.process_index == 0:
            self.say(
                f"engine auto: every token is trained, because {why}. --engine sparse trains on "
                "some tokens anyway"
            )


def _share_trained(logs: Mapping[str, Any]) -> str:
    ratio = logs.get(PREFIX + "ratio")
    return "" if ratio is None else f", {ratio:.0%} of the tokens trained"


def _result(
    run: TrainingRun, trainer: Trainer, gradients: Gradients, eval_loss: float | None
) -> SelectiveResult:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]

    def total(key: str) -> float:
        return float(sum(entry.get(PREFIX + key, 0.0) for entry in logs))

    return SelectiveResult(
        **run.result(trainer, eval_loss).as_dict(),
        tokens=total("tokens_total"),
        trained=total("tokens_selected"),
        flops_of_standard=gradients.totals().get("flops_of_standard"),
        engine="standard" if gradients.acting == OFF else gradients.engine,
    )
