"""`pliant expert train`: an expert learns by reward, in a folder that survives a kill."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from pliant.cli import terminal
from pliant.cli.shared_options import AnswerColumns, load_to_train
from pliant.errors import InvalidInput, did_you_mean
from pliant.loading.dtypes import Dtype
from pliant.options import Flag, from_texts, named_values

if TYPE_CHECKING:
    from pliant.experts.rewards import Reward
    from pliant.experts.training.config import ExpertTrainingConfig
    from pliant.experts.training.controls import Controls, ControlsConfig
    from pliant.experts.training.run import ExpertResult

EMBEDDED = "nano:"
Control = Literal["few-shot", "lora"]
Method = Literal["grpo", "rloo", "reinforce"]
QUESTIONS, MEASURED = 2000, 300
"""Of the embedded models' world: to train on, and to measure the accuracy on."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(AnswerColumns):
    base: str
    """The base: an embedded model, a folder, or a name on the hub."""
    task: str
    """Rows with prompt and answer (.jsonl, .csv, also .gz; a hub data set); or nano:KIND, a kind of
    question of the embedded models' world (nano:arithmetic, nano:count)."""
    out: Path
    """The run's folder, and in the end the expert's."""
    reward: Annotated[tuple[str, ...], Flag(metavar="REWARD")] = ("exact",)
    """What makes an answer right: exact, numeric, contains, choice, unit_tests, ..., with options
    and a weight (numeric:tolerance=0.1, contains=0.5), or file.py:function; repeatable: a sum."""
    group: str | None = None
    """Only the rows of the task whose column `group` has this value. Default: all."""
    evaluate: str | None = None
    """Rows like those of the task to measure the accuracy on. Default: some are held out."""
    rows: Annotated[int, Ge(2)] | None = None
    """Read only this many rows. Default: all."""
    method: Method = "grpo"
    """How it learns: against a group of answers, or as REINFORCE does."""
    steps: Annotated[int, Ge(1)] = 60
    """Updates of the expert."""
    learning_rate: float | None = None
    """Of Adam, which moves each number by about this much in a step. Default: 0.02 divided by the
    square root of the number of layers."""
    max_new_tokens: Annotated[int, Ge(1)] = 64
    """The longest answer, in tokens."""
    seed: int = 0
    """Of the held-out rows, the prompts and the sampled answers."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Also log to tensorboard (in OUT/runs) or wandb. --set report_to=... names others."""
    compare: tuple[Control, ...] = ()
    """Measure a control on the same held-out rows: few-shot (the base, with solved examples in the
    prompt) or lora (a LoRA, trained with as many answers, in OUT/lora); repeatable. Default: the
    base alone."""
    shots: Annotated[int, Ge(1), Flag(group="Method")] = 4
    """Examples in the prompt, for --compare few-shot."""
    lora_rank: Annotated[int, Ge(1)] = 16
    """Of the LoRA, for --compare lora."""
    lora_learning_rate: float | None = None
    """Of the LoRA, whose matrices need smaller steps than z. Default: 0.002."""
    set: Annotated[tuple[str, ...], Flag(metavar="NAME=VALUE")] = ()
    """Any other field of ExpertTrainingConfig (beta, parts, ...); repeatable. Default: its own
    values."""
    dtype: Dtype = "auto"
    """The base's type. auto: as it was saved."""
    device: str | None = None
    """cpu, cuda, ... Default: an accelerator, if there is one."""
    report: Path | None = None
    """Write a page with what was gained, how it learned and where the expert acts (.html). Default:
    none."""
    resume: bool = False
    """Resume from the run's last complete checkpoint."""
    json: bool = False
    """Print one JSON document."""

    def config(self) -> ExpertTrainingConfig:
        from pliant.experts.training.config import ExpertTrainingConfig

        return from_texts(
            ExpertTrainingConfig,
            named_values(self.set, "--set"),
            "--set",
            method=self.method,
            steps=self.steps,
            learning_rate=self.learning_rate,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            report_to=self.report_to,
        )

    def controls(self) -> ControlsConfig:
        from pliant.experts.training.controls import ControlsConfig

        rate = self.lora_learning_rate
        return ControlsConfig(
            shots=self.shots if "few-shot" in self.compare else None,
            lora_rank=self.lora_rank if "lora" in self.compare else None,
            **({} if rate is None else {"lora_learning_rate": rate}),
        )


def train(options: TrainOptions) -> None:
    """Turn a base into a specialist by reward; its file is a few kilobytes.

    It prints the accuracy on held-out rows before and after. Killed at any moment, the run loses
    only the steps since its last checkpoint: the same command with --resume continues there.

    Example: pliant expert train --base nano-l --task nano:reading --out reading
    """
    try:
        controls = trained(options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("--resume continues from what was saved") from None
    if options.report is not None:
        from pliant.cli.expert.report import write_report

        write_report(options.report, options.out, controls)
    result: ExpertResult = controls.expert
    if options.json:
        ways = [way.as_dict() for way in controls.ways] if options.compare else None
        terminal.print_json({"out": str(options.out), **result.as_dict(), "compared": ways})
        return
    from pliant.cli.expert.report import ways_table
    from pliant.reports.tables import Table

    tables = [Table(f"{options.out}: the expert", ["what", "how much"], result.cells())]
    compared = [ways_table(controls)] if options.compare else []
    sentences = [str(result), *([str(controls)] if options.compare else [])]
    terminal.draw([*tables, *compared], sentences)


def trained(options: TrainOptions) -> Controls:
    from pliant.cli.gradients.inputs import quiet_libraries

    config, controls = options.config(), options.controls()
    reward = reward_of(options)
    rows, held_out = task_rows(options, config.seed)
    reward.check({name for row in (*rows, *held_out) for name in row})
    reward.check_references((*rows, *held_out))
    check(options, config)
    reward.load()  # in training, an error of the reward would only be counted
    from pliant.experts.rewards import RewardWarning

    with quiet_libraries(RewardWarning):
        from pliant.experts.training.controls import train_with_controls

        model, tokenizer = load_to_train(options.base, options.dtype, options.device)
        return train_with_controls(
            model,
            tokenizer,
            rows,
            reward,
            config,
            folder=options.out,
            controls=controls,
            held_out=held_out,
            resume=options.resume,
            settings={"use_cpu": True} if options.device == "cpu" else None,
        )


def reward_of(options: TrainOptions) -> Reward:
    from pliant.experts.rewards import Reward
    from pliant.routing.judge import open_judge

    return Reward(*options.reward, open_judge=open_judge)


def check(options: TrainOptions, config: ExpertTrainingConfig) -> None:
    """Refuse what cannot be done before a model is loaded."""
    from pliant.loading import load_config
    from pliant.reports.page import check_writable
    from pliant.training.folder import check_folder

    if options.report is not None:
        check_writable(options.report)
    load_config(options.base)
    check_folder(options.out, options.resume)
    config.arguments(options.out)


# --- the task ------------------------------------------------------------------------------------


def task_rows(options: TrainOptions, seed: int) -> tuple[list[Any], list[Any]]:
    """The rows to train on, and those to measure the accuracy on; they share no prompt."""
    from pliant.data import duplicates
    from pliant.experts.training.task import hold_out

    if options.task.startswith(EMBEDDED):
        kind = options.task.removeprefix(EMBEDDED)
        rows = nano_rows(kind, "train", options.rows or QUESTIONS, seed)
        if options.evaluate is None:
            return rows, nano_rows(kind, "test", MEASURED, seed)
    else:
        rows = read(options.task, options)
        if options.evaluate is None:
            return hold_out(rows, seed)
    held_out = read(options.evaluate, replace(options, rows=None))
    shared = duplicates(*([str(row["prompt"]) for row in each] for each in (held_out, rows)))
    rows = [row for i, row in enumerate(rows) if i not in set(shared.test_rows)]
    if not rows:
        raise InvalidInput(f"--evaluate {options.evaluate}: every row of the task is in it too")
    return rows, held_out


def read(source: str, options: TrainOptions) -> list[Any]:
    """The rows of a file or data set, or those of one group."""
    group = options.group
    if group is None:
        return options.read(source, "answer", limit=options.rows)
    rows = options.read(source, "answer", "group")
    own = [row for row in rows if row["group"] == group]
    if not own:
        near = did_you_mean(group, sorted({str(row["group"]) for row in rows}))
        raise InvalidInput(f"{source}: no group {group!r}{near}")
    return own[: options.rows]


def nano_rows(kind: str, split: str, count: int, seed: int) -> list[Any]:
    """Questions of a family or of a domain."""
    from pliant import nano

    families = [*nano.TRAINED, *nano.HELD_OUT]
    own = [family.name for family in families if kind in (family.name, family.domain)]
    if not own:
        known = {name: None for family in families for name in (family.domain, family.name)}
        raise InvalidInput(f"{EMBEDDED}{kind}: no such kind{did_you_mean(kind, known)}")
    questions = nano.questions(split, count, seed, families=own)
    return [{"prompt": q.prompt, "answer": q.answer} for q in questions]
