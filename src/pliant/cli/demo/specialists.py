"""The demo's last chapter: nano-l learns new wordings by reward; each prompt picks its expert."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pliant import nano
from pliant.cli.demo.size import Size
from pliant.cli.demo.two_models import LARGE, WRONG, TwoModels
from pliant.cli.gradients.inputs import quiet_libraries
from pliant.cli.terminal import track
from pliant.data import Row
from pliant.experts.adapting import Answer, ByClassifier, load_experts
from pliant.experts.rewards import Reward
from pliant.experts.training.config import ExpertTrainingConfig
from pliant.experts.training.run import ExpertResult, train_expert
from pliant.reports.page import KeyFigure, Section
from pliant.reports.plots import bars
from pliant.reports.tables import Table

TASKS = ("plus", "biggest")
"""nano-l can add and compare, but has never been asked in these words."""
TRAINING: dict[str, Any] = {
    "parts": "all",  # learns more, and forgets more, which its own prompts alone see
    "prompts": 8,
    "group": 8,
    "learning_rate": 0.03,
    "schedule": "constant",
    "beta": 0.04,
    "max_new_tokens": 6,
}
TRAINED, HELD_OUT = 300, 100  # prompts of each task
LABELLED, ASKED = 60, 50  # of each task, to fit the classifier on and to ask at the end
EXPERT_FILE = "adapter_model.safetensors"
RIGHT = "✓"


@dataclass(frozen=True)
class Specialists:
    """The results of the chapter."""

    steps: int
    """Of each expert's training."""
    trained: dict[str, ExpertResult]
    bytes: dict[str, int]
    """Of the expert's file."""
    right: dict[str, dict[str, float]]
    """Shares of a mixed batch, by task, of the base and of the prompts' own experts."""
    routed: float
    """The share of the mixed batch that went to its own expert, or rightly to the base."""
    answers: tuple[tuple[str, str, bool, str, bool, str], ...]
    """Prompts, the base's answer, the chosen expert's, whether each is right, and who it was."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(measured: TwoModels, size: Size) -> Specialists:
    """Train an expert for each task, and ask a mixed batch that neither has seen."""
    known = [Row(prompt=q.prompt, answer=q.answer) for q in measured.questions[: 2 * ASKED]]
    with TemporaryDirectory() as place, quiet_libraries():
        trained = {
            task: _trained(task, Path(place) / task, size.expert_steps)
            for task in track(TASKS, "training experts")
        }
        sizes = {task: (Path(place) / task / EXPERT_FILE).stat().st_size for task in TASKS}
        strategy = _strategy(Path(place), size.known)
        mixed = {task: _rows(task, ASKED, seed=3) for task in TASKS} | {"base": known}
        answers = {task: strategy.answer(_prompts(rows)) for task, rows in mixed.items()}
        with strategy.model.disable_adapter():
            plain = {
                task: nano.ask(strategy.model, strategy.tokenizer, _prompts(rows))
                for task, rows in mixed.items()
            }
    own = [a.choice.name == task for task, given in answers.items() for a in given]
    return Specialists(
        steps=size.expert_steps,
        trained=trained,
        bytes=sizes,
        right={task: _shares(rows, plain[task], answers[task]) for task, rows in mixed.items()},
        routed=sum(own) / len(own),
        answers=tuple(
            _shown(row, before, after)
            for task, rows in mixed.items()
            for row, before, after in zip(rows[:2], plain[task], answers[task], strict=False)
        ),
    )


def _trained(task: str, folder: Path, steps: int) -> ExpertResult:
    model, tokenizer = nano.load(LARGE)
    held_out = _rows(task, HELD_OUT, seed=1)
    avoid = {row["prompt"] for row in held_out}
    rows = [row for row in _rows(task, TRAINED, seed=2) if row["prompt"] not in avoid]
    config = ExpertTrainingConfig(steps=steps, save_steps=steps, **TRAINING)
    return train_expert(
        model,
        tokenizer,
        rows,
        Reward("exact"),
        config,
        folder=folder,
        held_out=held_out,
        say=lambda line: None,
    )


def _strategy(place: Path, number: int) -> ByClassifier:
    """A head on the prompt's own states, from a few prompts of each task and of the known kinds."""
    base, tokenizer = nano.load(LARGE)
    model = load_experts(base, [place])
    prompts = {task: _prompts(_rows(task, LABELLED, seed=4)) for task in TASKS}
    known = [q.prompt for q in nano.questions("train", number)]
    labels = [task for task in TASKS for _ in prompts[task]] + ["base"] * len(known)
    every = [prompt for task in TASKS for prompt in prompts[task]] + known
    return ByClassifier.fit(model, tokenizer, every, labels)


def _rows(task: str, count: int, seed: int) -> list[Row]:
    """Different prompts of a task."""
    draw = random.Random(f"{task} {seed}")
    answers: dict[str, str] = {}
    while len(answers) < count:
        numbers = [draw.randint(10, 99) for _ in range(draw.randint(3, 4))]
        if task == "plus":
            answers[f"{numbers[0]} plus {numbers[1]}"] = str(numbers[0] + numbers[1])
        else:
            answers[f"biggest of {' '.join(map(str, numbers))}"] = str(max(numbers))
    return [Row(prompt=prompt, answer=answer) for prompt, answer in answers.items()]


def _prompts(rows: Sequence[Row]) -> list[str]:
    return [str(row["prompt"]) for row in rows]


def _shares(rows: Sequence[Row], plain: Sequence[str], own: Sequence[Answer]) -> dict[str, float]:
    due = [row["answer"] for row in rows]
    before = [text == answer for text, answer in zip(plain, due, strict=True)]
    after = [each.text.strip() == answer for each, answer in zip(own, due, strict=True)]
    return {"base": sum(before) / len(before), "own expert": sum(after) / len(after)}


def _shown(row: Row, plain: str, own: Answer) -> tuple[str, str, bool, str, bool, str]:
    text, due = own.text.strip(), row["answer"]
    return row["prompt"], plain, plain == due, text, text == due, own.choice.name


# --- what is shown -------------------------------------------------------------------------------


def figure(results: Specialists) -> KeyFigure:
    task, result = next(iter(results.trained.items()))
    note = f"right in new words, {result.before.value:.0%} before, in {results.bytes[task]:,} bytes"
    return KeyFigure("an expert gets", f"{result.after.value:.0%}", note)


def section(results: Specialists) -> Section:
    """The chapter as sentences, tables and a picture."""
    groups = [*TASKS, "what it knew"]
    series = {
        way: [results.right[task][way] for task in (*TASKS, "base")]
        for way in ("base", "own expert")
    }
    picture = bars(groups, series, {"own expert": "ours"}, "task", "share answered correctly")
    return Section(
        "Which speciality does a prompt call for?",
        sentences=_sentences(results),
        tables=(_answers(results),),
        pictures=((picture, "One batch of three kinds of prompt: the base, and their experts."),),
    )


def _sentences(results: Specialists) -> tuple[str, ...]:
    learned = [
        f"{result.before.value:.0%} to {result.after.value:.0%} of held-out prompts in the words "
        f"of '{example}' ({results.bytes[task] / 1000:.0f} kB)"
        for (task, result), (example, *_) in zip(
            results.trained.items(), results.answers[::2], strict=False
        )
    ]
    numbers = next(iter(results.trained.values())).trained
    known = results.right["base"]
    return (
        f"{LARGE} can add and compare, but has never been asked in these words. Two experts learn "
        f"them from nothing but whether an answer is right, in {results.steps} steps on "
        f"{numbers:,} parameters, one for each singular value: from {', and from '.join(learned)}.",
        f"Then all kinds of prompts come in one batch, and a linear head on each prompt's own "
        f"states picks its expert or the base: {results.routed:.1%} go where they belong. Of the "
        f"prompts that {LARGE} knew before, {known['own expert']:.0%} are answered correctly, "
        f"{known['base']:.0%} by the base alone.",
    )


def _answers(results: Specialists) -> Table:
    def marked(text: str, right: bool) -> str:
        return f"{RIGHT} {text}" if right else f"{WRONG} {text or '(nothing)'}"

    rows = [
        [prompt, marked(plain, plain_right), marked(text, right), name]
        for prompt, plain, plain_right, text, right, name in results.answers
    ]
    head = ["prompt", f"{LARGE} alone", "with its expert", "picked"]
    colours = {
        cell: "green" if cell.startswith(RIGHT) else "red" for row in rows for cell in row[1:3]
    }
    return Table("Each prompt picks its expert", head, rows, colours=colours)
