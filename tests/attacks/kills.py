"""Kills and Ctrl-C at any moment: nothing is lost, and the command goes on or says what to do."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from tests.attacks.judged import INTERRUPTED, Tally, fault, not_right
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
    always: str | None = None
    """A command that succeeds at any time, before it is run again, too."""


ASK = "route ask --router ../ours/router 2+2 --max-new-tokens 2"
FIT = "route fit --labels ../data/labels.jsonl --scorer length --force"

JOBS = {
    "label": Job(LABEL, "new.jsonl"),
    "fit": Job(f"{FIT} --out new", "new/router.json"),
    "train lm": Job(LM, "new/model.safetensors", True),
    "train scorer": Job(SCORER, "new/pliant.json", True),
    "expert train": Job(EXPERT, "new/adapter_config.json", True),
    "recover": Job(RECOVER, "new/model.safetensors", True),
    "prune": Job(
        "prune nano-s --heads 0.34 --no-controls --tokens 600 --out new", "new/model.safetensors"
    ),
    "merge": Job("expert merge ../ours/experts/words --out new", "new/model.safetensors"),
    "fit over a router": Job(
        f"{FIT} --out ../ours/router", "../ours/router/router.json", always=ASK
    ),
    "calibrate": Job(
        "route calibrate --router ../ours/router --labels ../data/labels.jsonl --force",
        "../ours/router/router.json",
        always=ASK,
    ),
}


def attack(worker: Worker, place: Workplace, count: int, seed: int = 0) -> Tally:
    """End each job in turn, at a random share of the time that it takes: one by a kill, the next by
    Ctrl-C, and in the next round the other way."""
    tally, draw = Tally("kills"), random.Random(seed)
    takes: dict[str, float] = {}
    for i in range(count):
        name = list(JOBS)[i % len(JOBS)]
        before = place.state()
        if name not in takes:
            whole = worker.run(JOBS[name].words.split(), place.cwd)
            takes[name] = whole.seconds
            if problem := fault(whole, place.reset(before)) or not_right(whole):
                tally.add(f"{name}, left alone", problem, whole)
            before = place.state()
        moment = draw.random() * takes[name]
        by_kill = (i + i // len(JOBS)) % 2 == 0
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
    if killed.code not in (0, -signal.SIGKILL if by_kill else INTERRUPTED):
        return f"the first run: {fault(killed) or killed.stderr[-300:]}"
    answers, complete = _answers(place.cwd), (place.cwd / job.result).is_file()
    if problem := _damage(job, place.cwd):
        return f"after the kill: {problem}"
    asked = None if job.always is None else worker.run(job.always.split(), place.cwd)
    if asked is not None and (problem := not_right(asked)):
        return f"after the kill, {job.always}: {problem}"
    again = worker.run(words, place.cwd)
    if again.code == 2 and job.resumes and "--resume" in again.stderr:
        again = worker.run([*words, "--resume"], place.cwd)
    if again.code == 2 and (killed.code == 0 or complete):  # all was done before the kill
        return fault(again)
    return _unfinished(job, again, answers, place.cwd)


def _unfinished(job: Job, again: Done, answers: list[bytes], folder: Path) -> str | None:
    """What the second run left undone, or lost of what the first had paid for."""
    if again.code != 0:
        return f"run again: exit {again.code}, {again.stderr[-300:]}"
    if not (folder / job.result).is_file():
        return f"run again: no {job.result}"
    lost = len(set(answers) - set(_answers(folder)))
    return f"{lost} answers are lost" if lost else None


def _answers(folder: Path) -> list[bytes]:
    """The complete lines of the journal of `route label`."""
    path = folder / "new.answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [line for line in lines if line.endswith(b"\n")]


def _damage(job: Job, folder: Path) -> str | None:
    """A file that ends in the middle."""
    result = folder / job.result
    for path in _files(result if result.parent == folder else result.parent):
        if "unfinished" in str(path):
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            if path.suffix == ".safetensors":
                safe_open(path, "numpy")  # compares the header with the size
        except (ValueError, SafetensorError):
            if path.parent.name.startswith(("checkpoint-", "tmp-checkpoint")):
                continue  # incomplete, which its marker says
            return f"{path.name} is not whole"
    return None


def _files(place: Path) -> Iterator[Path]:
    yield from (path for path in (place, *place.rglob("*")) if path.is_file())
