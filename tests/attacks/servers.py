"""Servers that fail in every way, and repeat the API key in every form."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from tests.attacks.judged import Tally, fault
from tests.attacks.worker import Done, Worker
from tests.attacks.workplace import Workplace
from tests.routing.backends.test_http import FAULTS
from tests.routing.chat_server import Scripted, chat_server
from tests.test_credentials import FORMS, KEY

REMOTE = "http://127.0.0.1:9/v1"
"""The address in the workplace's router, where no server is."""
STATUSES: Mapping[str, Scripted] = {
    **{f"status {code}": code for code in (100, 204, 206, 300, 304, 400, 401, 402, 403, 404, 405)},
    **{f"status {code}": code for code in (408, 409, 413, 418, 422, 429, 451, 500, 502, 503, 599)},
    "another place": (302, {"Location": "file:///etc/passwd"}),
    "nowhere": (307, {"Location": "http://["}),
    "a status of nine": (999, {}),
    "later": (429, {"Retry-After": "1e999"}),
    "never": (503, {"Retry-After": "Mon, 01 Jan 1"}),
    "hang up": "hang up",
    "stall": "stall",
    "no JSON": "<html>",
    "JSON of nothing": "null",
    "a list": "[]",
    "choices of another shape": '{"choices": {"message": "x"}}',
    "a choice of another shape": '{"choices": [{"message": ["x"]}]}',
    "no content": '{"choices": [{"message": {}}]}',
    "a number as content": '{"choices": [{"message": {"content": 7}}]}',
    "a NUL": '{"choices": [{"message": {"content": "\\u0000"}}]}',
    "a long answer": json.dumps({"choices": [{"message": {"content": "x" * 500_000}}]}),
    "a mark-up": '{"choices": [{"message": {"content": "[/bold]\\u001b[2J"}}]}',
    "a reason of another shape": '{"choices": [{"message": {"content": "x"}, "finish_reason": 7}]}',
}
ASKING, LABELLING, JUDGING = "ask", "label", "judge"
LIMIT = 60.0
"""Seconds after which a command gets Ctrl-C; its calls give up after one."""
QUESTIONS = 8
"""In the workplace's `questions.jsonl`."""
REPLIES: Mapping[str, Callable[[str], Scripted]] = {
    "answer": lambda text: json.dumps({"choices": [{"message": {"content": text}}]}),
    "reason": lambda text: (500, {}, text),
}
LABEL = ["route", "label", "--prompts", "../data/few.jsonl", "--out", "new.jsonl"]
LABEL += ["--tries", "1", "--concurrency", "1"]


def attack_clients(worker: Worker, place: Workplace, count: int) -> Tally:
    """A fault in the first reply to each command that asks a server."""
    tally = Tally("server faults")
    faults = {**FAULTS, **STATUSES}
    ways = [(name, way) for way in (ASKING, LABELLING, JUDGING) for name in faults]
    for name, way in _spread(ways, count):
        before = place.state()
        with chat_server([faults[name]]) as server:
            done = _asked(worker, place, way, server.url)
        problem = fault(done, place.reset(before))
        if problem is None and not server.bodies:
            problem = f"the server was not asked: exit {done.code}, {done.stderr[-200:]}"
        if problem is None and way == ASKING and name in FAULTS and "2+2" not in done.stdout:
            problem = f"the other model was not asked: exit {done.code}, {done.stderr[-200:]}"
        tally.add(f"{name} ({way})", problem, done)
    return tally


def _spread(ways: list[tuple[str, str]], count: int) -> Iterator[tuple[str, str]]:
    return islice(ways, 0, None, max(1, len(ways) // count))


def _asked(worker: Worker, place: Workplace, way: str, url: str) -> Done:
    if way == ASKING:
        settings = place.folder / "ours" / "remote" / "router.json"
        content = json.loads(settings.read_text().replace(REMOTE, url))
        for model in content["models"]:
            model["timeout"] = 1.0
        settings.write_text(json.dumps(content))
        words = ["route", "ask", "--router", "../ours/remote", "2+2"]
        return worker.run(words, place.cwd, limit=LIMIT)
    remote = f"far=openai:m@{url}"
    words = [*LABEL, "--timeout", "1", "--max-new-tokens", "2"]
    if way == JUDGING:
        words += ["--model", "nano-s", "--verifier", "judge", "--judge", remote]
    else:
        words += ["--model", remote, "--cost", "tokens"]
    return worker.run(words, place.cwd, limit=LIMIT)


def attack_keys(worker: Worker, place: Workplace) -> Tally:
    """A server repeats the key in every form: in an answer, and in the reason of a failure."""
    tally = Tally("API keys")
    forms = [(where, name, form) for where in REPLIES for name, form in FORMS.items()]
    repeats = [(f"{name} ({where})", form(KEY), where) for where, name, form in forms]
    for start in range(0, len(repeats), QUESTIONS):
        some = repeats[start : start + QUESTIONS]
        before = place.state()
        with chat_server([REPLIES[where](text) for _, text, where in some]) as server:
            words = [*LABEL, "--model", f"far=openai:m@{server.url}", "--cost", "tokens"]
            words[words.index("../data/few.jsonl")] = "../data/questions.jsonl"
            done = worker.run(words, place.cwd, environment={"OPENAI_API_KEY": KEY})
        sent = server.keys == [f"Bearer {KEY}"] * QUESTIONS  # so each form was repeated
        written = list(_written(place.cwd, done))
        problem = fault(done, place.reset(before)) or (
            None if sent else "the key was not sent with each question"
        )
        for name, text, _ in some:
            leaks = [where for where, content in written if _holds(content, text)]
            tally.add(name, f"the key is in {', '.join(leaks)}" if leaks else problem, done)
    return tally


def _written(folder: Path, done: Done) -> Iterator[tuple[str, str]]:
    yield from (("stdout", done.stdout), ("stderr", done.stderr))
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.name, path.read_bytes().decode("utf-8", "replace")


def _holds(text: str, repeated: str) -> bool:
    """Whether the key is in a text in this form, or as JSON writes the form."""
    word = max(repeated.split(), key=len)
    secret = word if len(word) >= 8 else repeated
    return any(form in text for form in (secret, json.dumps(secret)[1:-1]))
