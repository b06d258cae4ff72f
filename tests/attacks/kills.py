"""Kills and Ctrl-C at any moment: nothing is lost, and the command goes on or says what to do."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.attacks.judged import Tally, fault
from tests.attacks.worker import Done, Worker
from tests.attacks.workplace import Workplace

LM = """train lm --model nano-s --data ../data/questions.jsonl --engine exact --length 32
--out new --set max_steps=4 --set save_steps=1 --set per_device_train_batch_size=2"""
EXPERT = """expert train --base nano-s --task ../data/questions.jsonl --out new --steps 3
--device cpu --max-new-tokens 2 --set prompts=2 --set group=2 --set save_steps=1"""
SCORER = """train scorer --data ../data/questions.jsonl --output-dir new --num-epochs 2 
--batch-size 2 --device cpu"""
LABEL = """route label --prompts ../data/questions.jsonl --model nano-s --model nano-l
--out new.jsonl --max-new-tokens 8 --batch-size 1"""
RECOVER = """recover nano-s --teacher nano-s --data ../data/questions.jsonl --length 32 --train lora
--out new --set max_steps=3 --set save_steps=1 --set per_device_train_batch_size=2"""


@dataclass(frozen=True)
class Job:
    words: str
    result: str
    """Complete whenever it exists: a file, or a folder's file."""
    resumes: bool = False
    """Whether it goes on by --resume."""


JOBS = {
    "label": Job(LABEL, "new.jsonl"),
    "fit": Job(
        "route fit --labels ../data/labels.jsonl --scorer length --out new", "new/router.json"
    ),
    "train lm": Job(LM, "new/model.safetensors", True),
    "train scorer": Job(SCORER, "new/pliant.json", True),
    "expert train": Job(EXPERT, "new/adapter_config.json", True),
    "recover": Job(RECOVER, "new/model.safetensors", True),
    "prune": Job(
        "prune nano-s --heads 0.34 --no-controls --tokens 600 --out new", "new/model.safetensors"
    ),
    "merge": Job("expert merge ../ours/experts/words --out new", "new/model.safetensors"),
    "fit over a router": Job(
        "route fit --labels ../data/labels.jsonl --scorer length --out ../ours/router",
        "../ours/router/router.json",
    ),
    "calibrate": Job(
        "route calibrate --router ../ours/router --labels ../data/labels.jsonl",
        "../ours/router/router.json",
    ),
}


def attack(worker: Worker, place: Workplace, count: int, seed: int = 0) -> Tally:
    """End each job in turn, at a random share of the time that it takes: by a kill in the first
    round, by Ctrl-C in the second, and so on."""
    tally, draw = Tally("kills"), random.Random(seed)
    takes: dict[str, float] = {}
    for i in range(count):
        name = list(JOBS)[i % len(JOBS)]
        before = place.state()
        if name not in takes:
            takes[name] = worker.run(JOBS[name].words.split(), place.cwd).seconds
            place.reset(before)
            before = place.state()
        moment = draw.random() * takes[name]
        by_kill = i // len(JOBS) % 2 == 0
        problem = _ended(JOBS[name], worker, place, moment, by_kill)
        harmed = place.reset(before)
        problem = f"changed {harmed}" if harmed else problem
        how = "killed" if by_kill else "interrupted"
        tally.add(f"{name}, {how} after {moment:.2f} of {takes[name]:.2f} s", problem)
    return tally


def _ended(job: Job, worker: Worker, place: Workplace, moment: float, by_kill: bool) -> str | None:
    words = job.words.split()
    if by_kill:
        killed = worker.run(words, place.cwd, kill_after=moment)
    else:
        killed = worker.run(words, place.cwd, limit=moment)
    if killed.code not in (0, -signal.SIGKILL if by_kill else 130):
        return f"the first run: {fault(killed) or killed.stderr[-300:]}"
    rows = _rows(place.cwd)
    if problem := _damage(job, place.cwd):
        return f"after the kill: {problem}"
    again = worker.run(words, place.cwd)
    if again.code == 2 and job.resumes and "--resume" in again.stderr:
        again = worker.run([*words, "--resume"], place.cwd)
    if again.code == 2 and killed.code == 0:  # all was done before the kill
        return fault(again)
    return _unfinished(job, again, rows, place)


def _unfinished(job: Job, again: Done, rows: list[Any], place: Workplace) -> str | None:
    if again.code != 0:
        return f"run again: exit {again.code}, {again.stderr[-300:]}"
    if not (place.cwd / job.result).is_file():
        return f"run again: no {job.result}"
    later = _rows(place.cwd)
    lost = [row for row in rows if row["prompt"] not in {each["prompt"] for each in later}]
    return f"{len(lost)} labels are lost" if lost else None


def _rows(folder: Path) -> list[Any]:
    path = folder / "new.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _damage(job: Job, folder: Path) -> str | None:
    """A file that ends in the middle."""
    result = folder / job.result
    for path in _files(result if result.parent == folder else result.parent):
        content = path.read_bytes()
        try:
            if path.suffix == ".json" and "unfinished" not in str(path):
                json.loads(content)
        except ValueError:
            if path.parent.name.startswith(("checkpoint-", "tmp-checkpoint")):
                continue  # incomplete, which its marker says
            return f"{path.name} is not whole"
    return None


def _files(place: Path) -> Iterator[Path]:
    yield from (path for path in (place, *place.rglob("*")) if path.is_file())
