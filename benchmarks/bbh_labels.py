"""Labels of our own making: SmolLM2 135M and Gemma 3 270M on multiple choice of BIG-Bench Hard.

    python -m benchmarks.bbh_labels --data FOLDER

FOLDER holds `bbh.jsonl.gz`, rows of prompt, answer and group (the task). Asked are the tasks with a
closed set of options. Where a prompt lists texts as (A), (B), ..., the model gets the question
without the list, and its answer is the text with the highest mean log-probability of a token behind
"The answer is"; otherwise it is the likelier of two words such as yes and no. With --letters the
list stays and the letters are compared, at the one token in which they differ: there both models
guess. A model with a chat template gets the prompt as the user's message, a base model as "Q: ...
A:". Nothing is truncated. A prompt's cost is that of reading it, 2 operations for each parameter
and token. The controls: a guess among the options, and each task's most frequent answer.

Every answer is stored at once; started again, the rest is asked. The labels are written to
benchmarks/.cache/bbh-smollm2-gemma.jsonl, for `Outcomes.read`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from benchmarks.harness import CACHE, keep
from pliant.data import chat_text, has_chat_template, read_rows
from pliant.data.collate import pad_rows
from pliant.data.journal import Journal
from pliant.loading import load
from pliant.reports.tables import Table
from pliant.routing.backends.local import own_parameters
from pliant.routing.outcomes import Outcomes

MODELS = ("smollm2-135m", "gemma3-270m")
LABELS = CACHE / "bbh-smollm2-gemma.jsonl"
CLOSED = 0.95
"""The share of a task's answers that must be letters; rows with another answer are left out."""
LETTER = re.compile(r"\(([A-Z])\)")
LISTED, LIST = re.compile(r"^(\([A-Z]\)) *(.*)$", re.MULTILINE), "\nOptions:"


@dataclass(frozen=True)
class Question:
    prompt: str
    task: str
    options: tuple[str, ...]
    answer: str
    texts: tuple[str, ...] = ()
    """Of each option, where they are letters."""


def main(
    data: Annotated[Path, typer.Option(help="The folder of bbh.jsonl.gz.")],
    sample: Annotated[int, typer.Option(help="How many prompts are asked.", min=2)] = 1_500,
    letters: Annotated[bool, typer.Option(help="Compare letters, not texts.")] = False,
) -> None:
    """Ask both models, write the labels, and print each task's accuracies."""
    torch.set_num_threads(1)
    console = Console(highlight=False)
    everything = closed(read_rows(data / "bbh.jsonl.gz", ("prompt", "answer", "group")))
    rows = np.sort(np.random.default_rng(0).permutation(len(everything))[:sample])
    questions = [everything[row] for row in rows]
    way = "letters" if letters else "texts"
    with Journal(CACHE / f"bbh_labels-{way}-{sample}.jsonl") as journal:
        for name in MODELS:
            ask(name, questions, letters, journal, console)
        answers = {row["key"]: row for row in journal.rows()}
    outcomes = table(questions, answers)
    if sample == 1_500:
        outcomes.write(LABELS.with_stem(f"{LABELS.stem}-letters") if letters else LABELS)
        command = "python -m benchmarks.bbh_labels --data FOLDER" + " --letters" * letters
        keep("bbh_labels" + "_letters" * letters, figures(questions, outcomes), command)
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
            options: dict[str, str] = {}
            if letters >= CLOSED * len(members):
                options = dict(LISTED.findall(row["prompt"]))
            elif len(answers) == 2:
                options = dict.fromkeys(sorted(answers), "")
            if len(options) > 1 and row["answer"] in options:
                texts = tuple(text.strip() for text in options.values() if text.strip())
                texts = texts if len(texts) == len(options) else ()
                question = Question(row["prompt"], task, tuple(options), row["answer"], texts)
                questions.append(question)
    return questions


# --- asking ---------------------------------------------------------------------------------------


def ask(
    name: str, questions: Sequence[Question], letters: bool, journal: Journal, console: Console
) -> None:
    """Store each option's mean log-probability for every question not yet asked."""
    todo = [i for i in range(len(questions)) if f"{name} {i}" not in journal]
    if not todo:
        return
    model, tokenizer = load(name)
    for done, i in enumerate(todo):
        prompt, options = encode(questions[i], tokenizer, letters)
        flops = 2.0 * own_parameters(model) * len(prompt)
        scores = log_probabilities(model, prompt, options)
        journal.add({"key": f"{name} {i}", "scores": scores, "flops": flops})
        if done % 50 == 49:
            console.print(f"{name}: {done + 1:,} of {len(todo):,}", style="dim")


def encode(question: Question, tokenizer: Any, letters: bool) -> tuple[list[int], list[list[int]]]:
    """The prompt's ids, and those of each option behind it, without what all of them end with."""
    answers, text = question.options, question.prompt
    if question.texts and not letters:
        answers, text = question.texts, text.split(LIST)[0]
    if has_chat_template(tokenizer):
        text = chat_text([{"role": "user", "content": text}], tokenizer) + "The answer is"
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        prompt = tokenizer(f"Q: {text}\nA: The answer is")["input_ids"]
    options = [tokenizer(f" {a}", add_special_tokens=False)["input_ids"] for a in answers]
    if letters or not question.texts:  # up to the one token in which they differ
        start = len(os.path.commonprefix(options))
        prompt, options = (
            [*prompt, *options[0][:start]],
            [ids[start : start + 1] for ids in options],
        )
    return prompt, options


@torch.inference_mode()
def log_probabilities(
    model: Any, prompt: Sequence[int], options: Sequence[Sequence[int]]
) -> list[float]:
    """Each option's mean log-probability of a token; the prompt runs once, the options on its
    cache. (Padding behind an option changes nothing before it.)"""
    ran = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    first_V = ran.logits[0, -1].float().log_softmax(-1)
    scores = [[float(first_V[ids[0]])] for ids in options]
    if max(map(len, options)) > 1:
        cache = ran.past_key_values
        cache.batch_repeat_interleave(len(options))
        logits_BTV = model(pad_rows(options)[0], past_key_values=cache, use_cache=True).logits
        for own, ids, logits_TV in zip(scores, options, logits_BTV, strict=True):
            rows = logits_TV[: len(ids) - 1].float().log_softmax(-1)
            own += [float(row[token]) for row, token in zip(rows, ids[1:], strict=True)]
    return [float(np.mean(own)) for own in scores]


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
