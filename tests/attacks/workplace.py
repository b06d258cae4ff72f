"""A folder with what commands read, what they must leave alone, and what was forged to harm them.

data/     good inputs, which no command may change
hostile/  bad inputs, nor these
theirs/   files of somebody else, in the way of ours
ours/     routers, scorers, experts: what commands write to
cwd/      the working folder; empty at first
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import sqlite3
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.in_process import pliant
from tests.routing.labels import outcomes

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1"
GUARDED = ("data", "hostile", "theirs")
MODELS = ("nano-s", "nano-l")
LABEL = """route label --prompts ../data/few.jsonl --model nano-s --out ../ours/labels.jsonl
--max-new-tokens 2"""
TRAIN = """train lm --model nano-s --data ../data/few.jsonl --engine exact --length 64
--out ../ours/run --set max_steps=2 --set save_steps=1 --set per_device_train_batch_size=2"""
TRAIN_SCORER = """train scorer --model-name nano-s --data ../data/questions.jsonl --num-epochs 2
--output-dir ../ours/scorer-run --batch-size 4 --save-epochs --device cpu --prefixes disk
--prefix-folder ../ours/prefixes"""
PRUNE = "prune nano-s --heads 0.34 --no-controls --tokens 600 --adapters ../ours/pruned"
"""What made the labels, the runs and the pruning in `ours`."""
State = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Workplace:
    folder: Path

    @property
    def cwd(self) -> Path:
        return self.folder / "cwd"

    @classmethod
    def build(cls, folder: Path) -> Workplace:
        for name in (*GUARDED, "ours", "cwd", "home"):
            (folder / name).mkdir(parents=True)
        _good(folder / "data")
        _hostile(folder / "hostile")
        _theirs(folder / "theirs")
        _ours(folder / "ours", folder / "data" / "labels.jsonl")
        for name in (*GUARDED, "ours"):  # a copy to mend what a command has harmed
            shutil.copytree(folder / name, folder / "home" / name, symlinks=True)
        return cls(folder)

    def copy(self, folder: Path) -> Workplace:
        shutil.copytree(self.folder, folder, symlinks=True)
        return Workplace(folder)

    @property
    def environment(self) -> dict[str, str]:
        """In which commands find no home, no network and no package index."""
        home = str(self.folder / "home")
        offline = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
        here = {"HOME": home, "XDG_CACHE_HOME": home, "HF_HOME": f"{home}/hub"}
        return {**offline, **here, "PLIANT_BASES": f"{home}/bases", "OMP_NUM_THREADS": "1"}

    def state(self) -> State:
        """What tells whether a file was touched, of all that commands may not change."""
        seen = [path for name in GUARDED for path in (self.folder / name).rglob("*")]
        return {str(path.relative_to(self.folder)): _stamp(path) for path in sorted(seen)}

    def reset(self, before: State) -> list[str]:
        """Make all as it was; returns what was changed or is gone."""
        after = self.state()
        harmed = sorted(name for name, stamp in before.items() if after.get(name) != stamp)
        renew = ["ours", *(GUARDED if after != before else ())]
        for name in renew:
            if name == "ours" and _stamps(self.folder / name) == _stamps(
                self.folder / "home" / name
            ):
                continue
            shutil.rmtree(self.folder / name, ignore_errors=True)
            shutil.copytree(self.folder / "home" / name, self.folder / name, symlinks=True)
        shutil.rmtree(self.cwd, ignore_errors=True)
        self.cwd.mkdir(exist_ok=True)
        return harmed


def _stamp(path: Path) -> tuple[int, ...]:
    about = path.lstat()
    if path.is_dir() and not path.is_symlink():
        return (about.st_mode,)
    return (about.st_mode, about.st_size, about.st_mtime_ns, about.st_ino)


def _stamps(folder: Path) -> dict[str, tuple[int, ...]]:
    """Without inodes, which a copy has of its own."""
    return {str(path.relative_to(folder)): _stamp(path)[:3] for path in folder.rglob("*")}


@cache
def label_rows() -> list[Any]:
    """Labels of two models, enough for a fit, with all that `pliant route label` writes."""
    like: dict[str, Any] = json.loads((FIXTURES / "labels.jsonl").read_text().splitlines()[0])
    table = outcomes(260)
    return [
        {
            **{name: like[name] for name in ("unit", "used", "reached", "verifier")},
            "prompt": prompt,
            "group": group,
            "question": str(i),
            "right": dict(zip(MODELS, right.tolist(), strict=True)),
            "cost": {"nano-s": 4596480.0, "nano-l": 22473216.0},
            "answers": {"nano-s": "17", "nano-l": "17"},
        }
        for i, (prompt, group, right) in enumerate(
            zip(table.prompts, table.groups or (), table.right, strict=True)
        )
    ]


def write_rows(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- good inputs ---------------------------------------------------------------------------------


def _good(folder: Path) -> None:
    from pliant import nano

    rows = [
        {
            "prompt": q.prompt,
            "answer": q.answer,
            "completion": q.answer,
            "group": q.family,
            "question": str(i),
            "label": i % 2,
            "expert": ("words", "sums")[i % 2],
        }
        for i, q in enumerate(nano.questions("dev", 8, seed=1))
    ]
    write_rows(folder / "questions.jsonl", *rows)
    write_rows(folder / "few.jsonl", *rows[:3])
    (folder / "notes.txt").write_text("Sort: pear apple fig. The answer is apple fig pear.\n" * 20)
    (folder / "prompts.txt").write_text("2+2\nsort dcab\n")
    write_rows(folder / "labels.jsonl", *label_rows())
    grade = {"prompt": "explored 1", "model": "nano-s", "right": 0.5}
    write_rows(folder / "grades.jsonl", grade)
    (folder / "recipe.yaml").write_text("command: doctor\nmodel: nano-s\n")


# --- bad inputs ----------------------------------------------------------------------------------

PROMPTS: dict[str, Any] = {
    "no-messages": [],
    "empty-message": [{}],
    "odd-role": [{"role": "\ud800", "content": "2+2"}],
    "number-role": [{"role": 7, "content": "2+2"}],
    "null-content": [{"role": "user", "content": None}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "2+2"}]}],
    "number": 7,
    "null": None,
    "empty": "",
    "surrogate": "2+2\udc80",
    "nul": "2\0+2",
    "object": {"role": "user", "content": "2+2"},
    "nested": [[{"role": "user", "content": "2+2"}]],
    "long": "1+" * 3000,
}
"""Odd prompts, each a file of its own."""

DEEP = "[" * 100_000 + "]" * 100_000
CONTENTS: dict[str, bytes] = {
    "deep.jsonl": f'{{"prompt": {DEEP}, "text": {DEEP}}}\n'.encode(),
    "deep.json": DEEP.encode(),
    "deep.yaml": b"command: doctor\nmodel: " + b"[" * 5000 + b"]" * 5000,
    "latin.jsonl": '{"prompt": "é", "text": "é"}\n'.encode("latin-1"),
    "latin.txt": "é\n".encode("latin-1"),
    "latin.yaml": "command: é\n".encode("latin-1"),
    "zeros.jsonl": b"\0" * 100,
    "zeros.txt": b"\0" * 100,
    "zeros.yaml": b"command: doctor\nmodel: \0\n",
    "empty.jsonl": b"",
    "empty.txt": b"",
    "empty.yaml": b"",
    "blank.jsonl": b"\n\n",
    "objects.jsonl": b"{}\n{}\n",
    "numbers.jsonl": b"1\n2\n",
    "array.json": b'[{"prompt": "2+2"}, 7]',
    "not.csv": b'prompt,answer\n"2+2,4\n',
    "ragged.csv": b"prompt,answer\n1,2,3\n",
    "not.parquet": b"PAR1" + b"\xff" * 40 + b"PAR1",
    "not.jsonl.gz": gzip.compress(b'{"prompt": "2+2"}')[:-6],
    "plain.jsonl.gz": b'{"prompt": "2+2"}\n',
    "huge-number.jsonl": b'{"prompt": ' + b"9" * 6000 + b', "label": ' + b"9" * 6000 + b"}\n",
    "infinite.jsonl": b'{"prompt": "2+2", "label": Infinity, "answer": NaN}\n' * 3,
    "date.yaml": b"command: doctor\nmodel: 2020-01-01\n",
    "list.yaml": b"- command\n- doctor\n",
    "tag.yaml": b"command: !!python/object/apply:os.system ['true']\n",
    "anchor.yaml": b"command: &a doctor\nmodel: *a\njson: *b\n",
    "surrogate.yaml": b'command: doctor\nmodel: "\\ud800"\n',
    "self.yaml": b"command: run\nrecipe: self.yaml\n",
    "binary.yaml": b"command: doctor\nmodel: !!binary aGVsbG8=\n",
    "set.yaml": b"command: doctor\nmodel: !!set {a, b}\n",
}
"""Odd files by name."""
LABEL_FIELDS = ("prompt", "right", "cost", "used", "reached", "unit", "judging", "group")
ODD: list[Any] = [None, [], {}, "x", -1, float("nan"), {"nano-s": "x"}, {"nano-s": 10**400}]
ODD += [[1, 2], {"nano-s": None, "nano-l": None}, {"nano-s": [], "nano-l": {}}, True]
LABEL_FILES = [f"labels-{field}-{i}.jsonl" for field in LABEL_FIELDS for i in range(len(ODD))]


def _hostile(folder: Path) -> None:
    for name, prompt in PROMPTS.items():
        row = {"prompt": prompt, "answer": "4", "completion": "4", "label": 1, "expert": "sums"}
        write_rows(folder / f"prompt-{name}.jsonl", row, {**row, "label": 0}, row)
        write_rows(folder / f"text-{name}.jsonl", {"text": prompt}, {"text": "2+2"})
        write_rows(folder / f"messages-{name}.jsonl", {"messages": prompt, "label": 1})
        odd = {"prompt": "2+2", "answer": prompt, "completion": prompt, "label": prompt}
        write_rows(folder / f"answer-{name}.jsonl", {**odd, "expert": prompt}, {**odd}, {**odd})
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    _hostile_labels(folder)
    (folder / "folder.jsonl").mkdir()
    (folder / "folder.json").mkdir()
    (folder / "loop.jsonl").symlink_to("loop.jsonl")


def _hostile_labels(folder: Path) -> None:
    """Label files with one field changed in each."""
    rows = label_rows()
    for field in LABEL_FIELDS:
        for i, value in enumerate(ODD):
            changed = [{**row, field: value} if j % 3 == 0 else row for j, row in enumerate(rows)]
            write_rows(folder / f"labels-{field}-{i}.jsonl", *changed)


# --- files of somebody else ----------------------------------------------------------------------


def _theirs(folder: Path) -> None:
    contents: dict[str, bytes] = {
        "notes.txt": b"our notes\n",
        "page.html": b"<html>somebody's page</html>",
        "picture.svg": b"not one of ours",
        "table.jsonl": b'{"name": "somebody"}\n',
        "table.answers.jsonl": b'{"name": "somebody"}\n{"half',
        "scores.json": b'{"name": "somebody"}',
        "data.csv": b"name\nsomebody\n",
        "evaluation.json": b"[1, 2]",
        "key.bin": bytes(range(256)),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for name in ("full", "pliant-train.json", "model"):
        (folder / name).mkdir()
        (folder / name / "thesis.txt").write_text("years of work\n")
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    with sqlite3.connect(folder / "books.sqlite") as database:
        database.execute("create table books (title text)")
        database.execute("insert into books values ('Emma')")
    database.close()
    (folder / "dangling.html").symlink_to("nothing.html")
    (folder / "link.jsonl").symlink_to("table.jsonl")
    (folder / "pickled.pt").write_bytes(pickle.dumps({"a": 1}))


# --- what commands write to ----------------------------------------------------------------------


def _ours(folder: Path, labels: Path) -> None:
    """A router, a scorer, two experts, gates and a model, all of nano-s."""
    import torch
    from peft import get_peft_model

    from pliant import nano
    from pliant.experts import SVFConfig
    from pliant.structure import GateConfig, attach

    shutil.copytree(FIXTURES / "scorer", folder / "scorer")
    fit = ["route", "fit", "--labels", labels, "--scorer", "text", "--scorer", "length", "--force"]
    done = pliant(*map(str, fit), "--out", str(folder / "router"), cwd=folder)
    assert done.returncode == 0, done.stderr
    shutil.copy(FIXTURES / "router" / "ledger.sqlite", folder / "router")
    _explored(folder / "router" / "ledger.sqlite")
    done = pliant("route", "learn", "--router", "router", cwd=folder)
    assert done.returncode == 0, done.stderr
    model, tokenizer = nano.load("nano-s")
    options: dict[str, Any] = {"target_modules": ["down_proj"], "layers_to_transform": [2]}
    experts = get_peft_model(model, SVFConfig(**options), adapter_name="words")
    experts.add_adapter("sums", SVFConfig(**options))
    with torch.no_grad():
        for i, parameter in enumerate(p for p in experts.parameters() if p.requires_grad):
            parameter += 0.1 * (i + 1)
    experts.save_pretrained(folder / "experts")
    model, tokenizer = nano.load("nano-s")
    gates = attach(model, GateConfig(("layers",)))
    gates["layers", 1].data.zero_()
    gates.save_pretrained(folder / "gates")
    heads = "expert classify --experts experts --data ../data/questions.jsonl --out head"
    for words in (LABEL, TRAIN, TRAIN_SCORER, PRUNE, heads):
        done = pliant(*words.replace("../ours/", "").split(), cwd=folder)
        assert done.returncode == 0, done.stderr
    _killed(folder / "run", "checkpoint-2")
    _killed(folder / "scorer-run", "checkpoint-4")
    model, tokenizer = nano.load("nano-s")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    remote_router(folder / "remote", "http://127.0.0.1:9/v1")


def _killed(run: Path, last: str) -> None:
    """Make it as if the run had been killed before its last checkpoint."""
    shutil.rmtree(run / last)
    record = run / "pliant-train.json"
    for path in run.iterdir():
        if path.is_file() and path != record:
            path.unlink()
    begun = json.loads(record.read_text())
    record.write_text(json.dumps({k: v for k, v in begun.items() if k != "ended"}))


def _explored(path: Path) -> None:
    """Add what a router leaves in its ledger that asked both models of twenty prompts."""
    from pliant.routing.backends import Used
    from pliant.routing.live.decision import Decision, Reply
    from pliant.routing.live.ledger import Ledger

    answers = dict.fromkeys(MODELS, ("4", 1.0))
    with Ledger(path, prompts=True) as ledger:
        for i in range(20):
            decision = Decision("nano-l", 0.5, 0.1, "because", "nano-l", novel=True)
            row, _ = ledger.record(f"explored {i}", None, decision, 5.0, 0.0)
            ledger.answered(row, Reply("4", decision, 5.0, 0.0, "flops", Used(), ("4",)))
            ledger.grades.explored(row, f"explored {i}", None, answers, [])
            for model in MODELS:
                ledger.grades.grade(row, model == "nano-l", model)


def remote_router(folder: Path, url: str, **changes: Any) -> None:
    """A router between two models of one server."""
    from pliant.routing import Outcomes, scorers
    from pliant.routing.router import Router
    from pliant.routing.router_file import make

    models = [
        {"name": name, "backend": f"{name}=openai:m@{url}", "cost": cost, "tries": 1, **changes}
        for name, cost in (("weak", 1.0), ("strong", 5.0))
    ]
    threshold = {"value": 0.2, "sentence": "a fifth"}
    file = make(
        unit="calls",
        models=models,
        scorer={"kind": "length"},
        threshold=threshold,
        default="strong",
    )
    prompts = tuple("x" * n for n in range(2, 62))
    right = [[float(len(prompt) < 30), 1.0] for prompt in prompts]
    outcomes = Outcomes(prompts, file.names, right, [[1.0, 5.0]] * len(prompts))
    Router(file, scorers.make("length").fit(outcomes, None, 0)).save(folder)
