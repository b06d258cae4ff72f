"""An expert trained by reward, in a folder that survives a kill.

    result = train_expert(model, tokenizer, rows, reward, ExpertTrainingConfig(), folder="math")
    print(result)            # accuracy on held-out rows before and after, with an interval

The folder holds the expert as PEFT saves it (kilobytes), its checkpoints and `log.jsonl`. The model
is as it was when the function returns: `PeftModel.from_pretrained(model, folder)` loads the expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pliant.adapters.files import write_file
from pliant.adapters.fingerprint import fingerprint
from pliant.anatomy import Anatomy
from pliant.anatomy.find import unwrap
from pliant.data import Row
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.experts.config import SVFConfig
from pliant.experts.expert import Expert
from pliant.experts.folder import CARD
from pliant.experts.rewards import Reward
from pliant.experts.training.answers import greedy_answers
from pliant.experts.training.config import ExpertTrainingConfig
from pliant.experts.training.task import Task, encode, hold_out
from pliant.experts.training.trainer import TRAINERS, RewardFunction, SafeReward
from pliant.stats import Band, bootstrap, paired
from pliant.training.result import TrainingResult, ends_of
from pliant.training.run import TrainingRun
from pliant.training.terminal import Say, print_to_stderr

FEWEST_ROWS = 10
"""Of fewer held-out rows, an interval would claim more than they can tell."""


@dataclass(frozen=True)
class ExpertResult(TrainingResult):
    """What a training came to. Rewards of greedy answers to held-out prompts: with a verifier as
    the reward, accuracies."""

    method: str
    trained: int
    """How many numbers were trained."""
    first_reward: float
    """The mean reward of the sampled answers in the first logged steps."""
    last_reward: float
    rewards: tuple[float, float] | None
    """The same of the first and of the last steps, ten or more each; None if there were too few."""
    kl: float | None
    """From the base, in nats a token, in the last logged steps; None without beta."""
    held_out: int
    before: Band
    after: Band
    gain: Band
    """after - before, on the same resamples of the held-out prompts."""
    rollout_share: float
    """Of the time of the steps."""
    shared_prefill: bool
    reward_failures: int
    """Rewards that raised an error or were not a number, since the run was resumed."""

    @property
    def too_few_rows(self) -> bool:
        """Whether the held-out rows are too few to tell what changed."""
        return self.held_out < FEWEST_ROWS

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        failed = f"; {self.reward_failures:,} rewards failed" if self.reward_failures else ""
        trained = f"{self.steps:,} {self.steps_word} on {self.trained:,} parameters"
        change = f"from {self.before.value:.3f} to {self.after.value:.3f}"
        if self.too_few_rows:
            return (
                f"{trained}; held-out rows: {self.held_out}, too few to tell what changed (the "
                f"reward went {change}){failed}"
            )
        if not self.gain.excludes(0):
            return (
                f"{trained} did not change the held-out reward measurably, {change}: {self.gain} "
                f"(the interval includes 0){failed}"
            )
        direction = "raised" if self.gain.value > 0 else "lowered"
        return f"{trained} {direction} the held-out reward {change}: {self.gain}{failed}"

    def cells(self) -> list[list[str]]:
        """The rows of the final table: what, and how much."""
        kl = [] if self.kl is None else [["KL from the base, nats a token", f"{self.kl:.4f}"]]
        failed = [["rewards that failed", f"{self.reward_failures:,}"]]
        return [
            ["method", self.method],
            ["trained", f"{self.trained:,} parameters"],
            *super().cells(),
            ["reward of sampled answers", self._sampled()],
            *kl,
            ["answers took, of each step", f"{self.rollout_share:.0%}"],
            *(failed if self.reward_failures else []),
            [f"{self.held_out:,} held-out rows, before", self._held_out(self.before)],
            ["after", self._held_out(self.after)],
            ["gain (paired)", self._held_out(self.gain)],
        ]

    def loss_cells(self) -> list[list[str]]:
        """None: the loss of a policy is near 0 at all times, whatever it has learned."""
        return []

    def _held_out(self, band: Band) -> str:
        return f"{band.value:.3f}; too few rows for an interval" if self.too_few_rows else str(band)

    def _sampled(self) -> str:
        if self.rewards is None:
            steps = f"{self.steps} {self.steps_word}"
            return f"{self.last_reward:.3f}; {steps}: too few to tell whether it rose"
        first, last = self.rewards
        return f"{first:.3f} -> {last:.3f}"


@dataclass(frozen=True)
class Measured:
    """A training's result, and the reward of every held-out row before and after."""

    result: ExpertResult
    before: list[float]
    after: list[float]


def train_expert(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    reward: RewardFunction,
    config: ExpertTrainingConfig | None = None,
    *,
    folder: str | Path,
    held_out: Sequence[Row] | None = None,
    resume: bool = False,
    peft_config: Any = None,
    settings: Mapping[str, Any] | None = None,
    say: Say = print_to_stderr,
) -> ExpertResult:
    """Train an expert on `model` by `reward`, or resume that; write it to `folder`.

    Rows have a prompt (a text or messages), and the columns that the reward needs. Without
    `held_out`, some of them are held out. `peft_config` trains another method of PEFT instead, as a
    control, and `settings` are fields of trl's configuration.
    """
    return train_and_measure(
        model,
        tokenizer,
        rows,
        reward,
        config,
        folder=folder,
        held_out=held_out,
        resume=resume,
        peft_config=peft_config,
        settings=settings,
        say=say,
    ).result


def train_and_measure(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    reward: RewardFunction,
    config: ExpertTrainingConfig | None = None,
    *,
    folder: str | Path,
    held_out: Sequence[Row] | None = None,
    resume: bool = False,
    peft_config: Any = None,
    settings: Mapping[str, Any] | None = None,
    say: Say = print_to_stderr,
    before: Sequence[float] | None = None,
) -> Measured:
    """`train_expert`, with the rewards of all held-out rows; `before`, if they are known, are the
    base's."""
    _check(model, reward)
    config, target = config or ExpertTrainingConfig(), Path(folder).expanduser()
    config = config.resolved(len(Anatomy.of(model).layers))
    task, held_out_task = _encoded(model, tokenizer, rows, held_out, reward, config)
    args = config.arguments(target, **(settings or {}))
    plan = _plan(model, task, held_out_task, reward, config, peft_config)
    safe_reward = SafeReward(reward)

    def measure(model: Any) -> list[float]:
        return rewards_of(model, tokenizer, held_out_task, safe_reward, config.max_new_tokens)

    run = TrainingRun(args, plan, resume=resume, say=say)
    if run.record.get("before") is None:
        run.note(before=measure(model) if before is None else list(before))
    with _restored(model, tokenizer) as trainers:

        def build() -> Any:
            trainer = TRAINERS[config.method](
                model,
                args=args,
                processing_class=tokenizer,
                peft_config=config.expert if peft_config is None else peft_config,
                config=config,
                task=task,
                reward=safe_reward,
            )
            trainers.append(trainer)
            return trainer

        trainer = run.train(build, describe=_describe)
        expert = unwrap_to_peft(trainer.model)
        _save(trainer, expert, target)
        after = measure(expert)
        result = _result(run, trainer, expert, safe_reward, after)
    run.note(ended=result.as_dict())
    return Measured(result, list(run.record["before"]), after)


def _encoded(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    held_out: Sequence[Row] | None,
    reward: RewardFunction,
    config: ExpertTrainingConfig,
) -> tuple[Task, Task]:
    """The rows to train on, and the held-out ones."""
    if held_out is None:
        rows, held_out = hold_out(rows, config.seed)
    longest = context_of(model) - config.max_new_tokens
    tasks = [encode(each, tokenizer, config.chat, longest) for each in (rows, held_out)]
    if isinstance(reward, Reward):
        for task in tasks:
            reward.check(task.rows[0])
    return tasks[0], tasks[1]


def rewards_of(
    model: Any,
    tokenizer: Any,
    task: Task,
    reward: SafeReward,
    max_new_tokens: int,
    end: str | None = None,
) -> list[float]:
    """The reward of the greedy answer to each prompt, up to the text `end`; one that fails is 0."""
    ids = greedy_answers(model, task.ids, max_new_tokens, tokenizer)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    if end is not None:
        texts = [text.lstrip().partition(end)[0] for text in texts]
    rewards = reward(
        prompts=[row["prompt"] for row in task.rows],
        completions=texts,
        completion_ids=ids,
        **task.columns(range(len(task.rows))),
    )
    return [0.0 if r is None else r for r in rewards]


def unwrap_to_peft(model: Any) -> Any:
    """The PeftModel inside what several processes wrap around it."""
    while not hasattr(model, "peft_config") and hasattr(model, "module"):
        model = model.module
    return model


def _save(trainer: Any, expert: Any, folder: Path) -> None:
    """The expert alone, as PEFT saves it; all processes take part where it is sharded.

    PEFT's model card names the base by the path that it was loaded from, so ours takes its place.
    """
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped or expert)
    if trainer.args.should_save:
        card = folder / CARD
        before = card.read_bytes() if card.is_file() else None
        expert.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        card.unlink(missing_ok=True)
        if before is not None:
            write_file(card, before)
        elif isinstance(expert.peft_config["default"], SVFConfig):
            write_file(card, Expert.load(folder).card().encode())


def _plan(
    model: Any,
    task: Task,
    held_out_task: Task,
    reward: RewardFunction,
    config: ExpertTrainingConfig,
    peft_config: Any,
) -> dict[str, Any]:
    """What the result depends on."""
    own = {k: v for k, v in asdict(fingerprint(model)).items() if k != "adapters" or v}
    other: dict[str, Any] = {}
    if peft_config is not None:
        other = {"peft": str(peft_config.peft_type), "rank": getattr(peft_config, "r", None)}
    return {
        "model": own,
        "reward": _name_of(reward),
        "content": task.digest,
        "held-out rows": held_out_task.digest,
        "config": config.plan,
        **other,
    }


def _name_of(reward: RewardFunction) -> Any:
    """A reward of several parts by its parts, any other by its name."""
    if (parts := getattr(reward, "parts", None)) is not None:
        return [f"{part.label}={part.weight:g}" for part in parts]
    return getattr(reward, "__name__", None) or type(reward).__name__


def _result(
    run: TrainingRun,
    trainer: Any,
    expert: Any,
    reward: SafeReward,
    after: Sequence[float],
) -> ExpertResult:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    first, last = np.asarray(run.record["before"]), np.asarray(after)
    count = len(first)
    nothing = float("nan")
    return ExpertResult(
        **run.result(trainer).as_dict(),
        method=trainer.config.method,
        trained=sum(p.numel() for p in expert.parameters() if p.requires_grad),
        first_reward=logs[0].get("task_reward") or 0.0 if logs else nothing,
        last_reward=logs[-1].get("task_reward") or 0.0 if logs else nothing,
        rewards=ends_of(logs, "task_reward"),
        kl=logs[-1].get("kl") if logs else None,
        held_out=count,
        before=bootstrap(lambda rows: float(first[rows].mean()), count),
        after=bootstrap(lambda rows: float(last[rows].mean()), count),
        gain=paired(
            lambda rows: float(last[rows].mean()), lambda rows: float(first[rows].mean()), count
        ),
        rollout_share=float(np.mean([e["rollout_share"] for e in logs])) if logs else nothing,
        shared_prefill=bool(trainer.shares_prefill),
        reward_failures=reward.failures,
    )


def _describe(logs: Mapping[str, Any]) -> str:
    parts = [f", reward {logs['task_reward']:.3f}"] if logs.get("task_reward") is not None else []
    parts += [f", KL {logs['kl']:.4f}"] if logs.get("kl") is not None else []
    parts += [f", answers {logs['rollout_share']:.0%} of the step"]
    parts += [f", {logs['reward_failures']} rewards failed"] if logs["reward_failures"] else []
    return "".join(parts)


@contextmanager
def _restored(model: Any, tokenizer: Any) -> Iterator[list[Any]]:
    """PEFT changes the model's projections, and trl its forward, pad token and mode: after the
    block they are as before. Yields a list for the trainer whose expert is to be unloaded."""
    text, generation = model.config.get_text_config(), model.generation_config
    settings = [(model.config, "use_cache"), (text, "pad_token_id"), (generation, "pad_token_id")]
    before = [(owner, name, getattr(owner, name, None)) for owner, name in settings]
    forward, training = vars(model).get("forward"), model.training
    required = {p: p.requires_grad for p in model.parameters()}
    pad, trainers = tokenizer.pad_token, list[Any]()
    try:
        yield trainers
    finally:
        for trainer in trainers:
            unwrap_to_peft(trainer.model).unload()
        vars(model).pop("forward", None)
        if forward is not None:
            model.forward = forward
        for owner, name, value in before:
            setattr(owner, name, value)
        for parameter, was in required.items():
            parameter.requires_grad_(was)
        tokenizer.pad_token = pad
        model.train(training)


def _check(model: Any, reward: Any) -> None:
    if not callable(reward):
        raise InvalidInput(f"reward = {reward!r}: give a Reward, or a function of completions")
    if unwrap(model) is not model:
        raise UnsupportedModel(
            "the model is wrapped already: give the stock model inside it, on which the expert is "
            "to be trained"
        )


def context_of(model: Any) -> int:
    """The longest text that the model takes."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else 2**31
