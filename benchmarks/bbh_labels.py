"""Labels of our own making: SmolLM2 135M and Gemma 3 270M on multiple choice of BIG-Bench Hard.

    python -m benchmarks.bbh_labels --data FOLDER

FOLDER holds `bbh.jsonl.gz`, rows of prompt, answer and group (the task). Asked are the tasks with a
closed set of options: letters, of which a prompt lists its own, or two words such as yes and no. A
model's answer is the option with the highest log-probability behind "The answer is"; it is right if
that is the row's answer. Options differ in one token, in which they are compared, so no length has
to be normalised. A model with a chat template gets the prompt as the user's message, a base model
as "Q: ... A:". Nothing is truncated. A prompt's cost is that of reading it, 2 operations for each
parameter and token. The controls: a guess among the options, and each task's most frequent answer.

Every batch is stored when it is done; started again, the rest is asked. The labels are written to
benchmarks/.cache/bbh-smollm2-gemma.jsonl, for `Outcomes.read`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks.harness import CACHE, keep
from pliant.anatomy import Anatomy
from pliant.anatomy.decoder import last_hidden_state, run_decoder, run_head, with_hidden
from pliant.data import chat_text, has_chat_template, read_rows
from pliant.data.journal import Journal
from pliant.loading import load
from pliant.prefill import Batch, alike, supports_padding
from pliant.prefill.forward import inputs_of
from pliant.reports.tables import Table
from pliant.routing.backends.local import own_parameters
from pliant.routing.outcomes import Outcomes

MODELS = ("smollm2-135m", "gemma3-270m")
LABELS = CACHE / "bbh-smollm2-gemma.jsonl"
TOKENS_A_BATCH = 1_024
CLOSED = 0.95
"""The share of a task's answers that must be letters; rows with another answer are left out."""
LETTER, LISTED = re.compile(r"\(([A-Z])\)"), re.compile(r"^\(([A-Z])\)", re.MULTILINE)


@dataclass(frozen=True)
class Question:
    prompt: str
    task: str
    options: tuple[str, ...]
    answer: str


def main(
    data: Annotated[Path, typer.Option(help="The folder of bbh.jsonl.gz.")],
    sample: Annotated[int, typer.Option(help="How many prompts are asked.", min=2)] = 1_500,
) -> None:
    """Ask both models, write the labels, and print each task's accuracies."""
    torch.set_num_threads(1)
    console = Console(highlight=False)
    everything = closed(read_rows(data / "bbh.jsonl.gz", ("prompt", "answer", "group")))
    rows = np.sort(np.random.default_rng(0).permutation(len(everything))[:sample])
    questions = [everything[row] for row in rows]
    with Journal(CACHE / f"bbh_labels-{sample}.jsonl") as journal:
        for name in MODELS:
            ask(name, questions, journal, console)
        answers = {row["key"]: row for row in journal.rows()}
    outcomes = table(questions, answers)
    if sample == 1_500:
        outcomes.write(LABELS)
        keep("bbh_labels", figures(questions, outcomes), "python -m benchmarks.bbh_labels --data F")
    draw(figures(questions, outcomes)).draw(console)


def closed(rows: Sequence[Any]) -> list[Question]:
    """The questions with options."""
    by_task: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        by_task[row["group"]].append(row)
    questions = []
    for task, members in by_task.items():
        answers = Counter(row["answer"] for row in members)
        letters = sum(bool(LETTER.fullmatch(row["answer"])) for row in members)
        for row in members:
            options: tuple[str, ...] = ()
            if letters >= CLOSED * len(members):
                options = tuple(f"({letter})" for letter in LISTED.findall(row["prompt"]))
            elif len(answers) == 2:
                options = tuple(sorted(answers))
            if len(options) > 1 and row["answer"] in options:
                questions.append(Question(row["prompt"], task, options, row["answer"]))
    return questions


# --- asking ---------------------------------------------------------------------------------------


def ask(name: str, questions: Sequence[Question], journal: Journal, console: Console) -> None:
    """Store each option's log-probability, up to a constant, for every question not yet asked."""
    todo = [i for i in range(len(questions)) if f"{name} {i}" not in journal]
    if not todo:
        return
    model, tokenizer = load(name)
    anatomy = Anatomy.of(model)
    encoded = {i: encode(questions[i], tokenizer) for i in todo}
    lengths = [len(encoded[i][0]) for i in todo]
    done, equal = 0, not supports_padding(anatomy)
    for rows in alike(lengths, equal=equal, tokens=TOKENS_A_BATCH):
        members = [todo[row] for row in rows]
        logits = last_logits(anatomy, [encoded[i][0] for i in members])
        for i, logits_V in zip(members, logits, strict=True):
            ids, options = encoded[i]
            flops = 2.0 * own_parameters(model) * len(ids)
            scores = logits_V.log_softmax(-1)[options].tolist()
            journal.add({"key": f"{name} {i}", "scores": scores, "flops": flops})
        done += len(members)
        console.print(f"{name}: {done:,} of {len(todo):,}", style="dim")


def encode(question: Question, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids up to where the options differ, and each option's token there."""
    if has_chat_template(tokenizer):
        message = {"role": "user", "content": question.prompt}
        text = chat_text([message], tokenizer) + "The answer is"
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        prompt = tokenizer(f"Q: {question.prompt}\nA: The answer is")["input_ids"]
    options = [
        tokenizer(f" {option}", add_special_tokens=False)["input_ids"]
        for option in question.options
    ]
    start = len(os.path.commonprefix(options))
    if len({tuple(ids[start + 1 :]) for ids in options}) > 1:
        raise ValueError(f"{question.options} differ in more than one token: {options}")
    return [*prompt, *options[0][:start]], [ids[start] for ids in options]


@torch.inference_mode()
def last_logits(anatomy: Anatomy, ids: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    """Each prompt's logits of its last token; the head runs there alone."""
    batch = Batch.of(ids)
    inputs = {**inputs_of(anatomy, batch), "use_cache": False}
    decoded = run_decoder(anatomy, inputs)
    last = with_hidden(decoded, last_hidden_state(decoded)[:, -1:])
    short = {**inputs, "input_ids": batch.ids_BT[:, -1:]}
    return iter(run_head(anatomy, last, short).logits[:, -1].float())


# --- what came of it ------------------------------------------------------------------------------


def table(questions: Sequence[Question], answers: dict[str, Any]) -> Outcomes:
    shape = (len(questions), len(MODELS))
    right, cost = np.zeros(shape), np.zeros(shape)
    for i, question in enumerate(questions):
        for j, name in enumerate(MODELS):
            row = answers[f"{name} {i}"]
            chosen = question.options[int(np.argmax(row["scores"]))]
            right[i, j], cost[i, j] = chosen == question.answer, row["flops"]
    prompts, groups = [q.prompt for q in questions], [q.task for q in questions]
    return Outcomes(tuple(prompts), MODELS, right, cost, tuple(groups), unit="flops")


def figures(questions: Sequence[Question], outcomes: Outcomes) -> dict[str, Any]:
    """Of each task and of all: how often each model is right, beside the controls."""
    tasks: dict[str, list[int]] = defaultdict(list)
    for i, question in enumerate(questions):
        tasks[question.task].append(i)

    def most_frequent(rows: Sequence[int]) -> int:
        return Counter(questions[i].answer for i in rows).most_common(1)[0][1]

    def of(rows: Sequence[int], frequent: int) -> dict[str, float]:
        part = outcomes.right[rows]
        return {
            "prompts": len(rows),
            "guess": float(np.mean([1 / len(questions[i].options) for i in rows])),
            "most frequent answer": frequent / len(rows),
            **dict(zip(MODELS, part.mean(axis=0).tolist(), strict=True)),
            "only the first": float(((part[:, 0] == 1) & (part[:, 1] == 0)).mean()),
            "only the second": float(((part[:, 0] == 0) & (part[:, 1] == 1)).mean()),
        }

    result = {task: of(rows, most_frequent(rows)) for task, rows in sorted(tasks.items())}
    every = sum(most_frequent(rows) for rows in tasks.values())
    return {**result, "all": of(range(len(questions)), every)}


def draw(by_task: dict[str, Any]) -> Table:
    head = list(by_task["all"])
    rows = [
        [task, f"{values['prompts']:,}", *(f"{values[name]:.2f}" for name in head[1:])]
        for task, values in by_task.items()
    ]
    return Table("The share of right answers", ["task", *head], rows, right=frozenset(head))


if __name__ == "__main__":
    typer.run(main)
