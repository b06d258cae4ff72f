"""What README shows under its commands is what they print: the same words, and nearly the numbers.

The commands run one after the other in one folder, as README has them, on the embedded models. Two
of them are cheaper here: `route fit` tries only the scorers that read the text, and the audit races
with fewer seeds, so that its intervals are not compared.
"""

from __future__ import annotations

import random
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.in_process import pliant

from pliant import nano
from pliant.data.rows import write_rows

README = Path(__file__).parents[1] / "README.md"
NUMBER = re.compile(r"(?<![\w.-])[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?(?![\w.]*\w)")
TIMES = [
    r"[\d.]+(?= +[\d.]+ GFLOPs)",  # seconds of the labels
    r"[\d.]+(?= +[\d.]+ [KM]?B )",  # ms of a decision
    r"[\d.]+(?=  \d\.\d{4} )",  # ms of a step
    r"[\d.]+(?= s\b)",
    r"(?<=seconds) +[\d.]+",
    r"[\d.]+(?=e-\d\d of the live)",
]
"""Parts of a line that differ from run to run, and are not compared."""
TEXT_SCORERS = ("text", "knn", "group", "tfidf", "length")
CHEAPER = {
    "route fit": [word for name in TEXT_SCORERS for word in ("--scorer", name)],
    "gradients audit": shlex.split("--batches 1 --draws 2 --turns 1 --seeds 2"),
}
INTERVAL = r"\[[-+\d., ]+\]"
MEASURED, TRAINED = 0.015, 0.06
"""How much decimals may differ between processors; those of a trained model differ more. Answers,
counts, steps and parameters are the same."""
UNIT = re.compile(r" ?(?:%|[KM]?B\b|points\b)")
UNCHECKED = {"recover", "doctor"}
"""Of the first nothing is shown; tests/test_docs.py runs the second."""


def shown() -> Iterator[tuple[list[str], list[str]]]:
    """Each command of README's blocks of text, and the lines under it."""
    for block in re.findall(r"^```text\n(.*?)^```", README.read_text("utf-8"), re.M | re.S):
        for part in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
            command, *lines = part.splitlines()
            yield shlex.split(command)[1:], [line for line in lines if line.strip(". ")]


def name_of(words: list[str]) -> str:
    return " ".join(word for word in words[:2] if re.fullmatch(r"[a-z]+", word))


COMMANDS = {name_of(words): (words, lines) for words, lines in shown()}


def test_readme_shows_what_its_commands_print(tmp_path: Path) -> None:
    """In one test, for each command needs what those before it wrote."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order are other numbers
    try:
        printed = outputs(tmp_path)
    finally:
        torch.set_num_threads(threads)
    wrong = {name: differences(name, COMMANDS[name][1], text) for name, text in printed.items()}
    assert {name: lines for name, lines in wrong.items() if lines} == {}


def outputs(folder: Path) -> dict[str, str]:
    """What each command prints."""
    for file, split in (("questions.jsonl", "dev"), ("test-questions.jsonl", "test")):
        rows = [
            {"prompt": q.prompt, "answer": q.answer, "group": q.family, "wording": q.wording}
            for q in nano.questions(split, 400)
        ]
        write_rows(folder / file, rows)
    write_rows(folder / "sums.jsonl", sums(500))
    label = " ".join(COMMANDS["route label"][0])
    test_labels = label.replace("questions.", "test-questions.").replace("labels.", "test.")
    assert pliant(*test_labels.split(), cwd=folder).returncode == 0
    printed = {}
    for name, (words, _) in COMMANDS.items():
        if name.split()[0] not in UNCHECKED:
            done = pliant(*words, *CHEAPER.get(name, []), cwd=folder)
            assert done.returncode == 0, (name, done.stderr)
            printed[name] = done.stdout
    return printed


def sums(count: int) -> list[dict[str, str]]:
    """Different sums in words that the models have not seen."""
    draw = random.Random("plus 0")
    answers: dict[str, str] = {}
    while len(answers) < count:
        a, b, *_ = [draw.randint(10, 99) for _ in range(draw.randint(3, 4))]
        answers[f"{a} plus {b}"] = str(a + b)
    return [{"prompt": prompt, "answer": answer} for prompt, answer in answers.items()]


def test_every_command_with_an_output_is_compared() -> None:
    assert len(COMMANDS) >= 10
    for name in UNCHECKED & {name.split()[0] for name in COMMANDS}:
        assert COMMANDS[next(each for each in COMMANDS if each.startswith(name))][1] == []


@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("nano-l | score 0.544", "nano-l | score 0.744"),
        ("nano-l | score 0.544", "nano-l | scores 0.544"),
        ("nano-l | score 0.544", "nano-s | score 0.544"),
        ("saved 16.2 %", "saved 16.2"),
        ("after 0.940 [0.890, 0.980]", "after 0.940"),
        ("86", "83"),
        ("steps  20", "steps  21"),
        ("trained  2,688 parameters", "trained  2,689 parameters"),
        ("random sequences, 38%  43  112.6  0.6425", "random sequences, 38%  44  112.6  0.6425"),
        ("(allowed: 1e-05)", "(allowed: 1e-04)"),
    ],
)
def test_a_line_that_is_not_printed_is_seen(line: str, other: str) -> None:
    for command in ("", "expert ask", "gradients audit"):
        assert differences(command, [line], f"before\n{line}\nafter\n") == []
        assert differences(command, [line], f"before\n{other}\nafter\n") == [line]
        assert differences(command, [line, "before"], f"before\n{line}\n") == ["before"]


@pytest.mark.parametrize(
    ("line", "other"),
    [("score 0.544", "score 0.548"), ("0.661  637 B", "0.661  638 B"), ("1.2 s", "3.4 s")],
)
def test_what_differs_between_machines_is_not(line: str, other: str) -> None:
    assert differences("", [line], other) == []


def differences(command: str, lines: list[str], output: str) -> list[str]:
    """The shown lines that are not printed, in their order."""
    missing, rest = [], output.splitlines()
    for line in lines:
        wanted = line
        if command == "route fit" and (wanted := _without_costs(line)) is None:
            continue
        at = next((i for i, each in enumerate(rest) if alike(wanted, each, command)), None)
        if at is None:
            missing.append(line)
        else:
            rest = rest[at + 1 :]
    return missing


def _without_costs(line: str) -> str | None:
    """A row of README's scorers as it is without those that cost something; None for those."""
    cells = re.split(r" {2,}", line.strip())
    if cells[0] in ("cpx", "probe", "stack"):
        assert len(cells) == 7, line
        return None
    if len(cells) >= 7 and cells[1:3] != ["APGR", "at equal cost"]:
        assert cells[1] == cells[2], f"{cells[0]} costs nothing"
    return "  ".join([*cells[:2], *cells[3:]]) if len(cells) >= 7 else line


def alike(line: str, other: str, command: str) -> bool:
    """The same words and whole numbers, and decimals that are close."""
    if command == "gradients audit":
        line, other = (re.sub(INTERVAL, "INTERVAL", each) for each in (line, other))
    (words, numbers), (other_words, other_numbers) = parts(line), parts(other)
    if words != other_words or len(numbers) != len(other_numbers):
        return False
    share = TRAINED if command.startswith(("train", "expert")) else MEASURED
    return all(
        exact == other_exact and abs(a - b) <= (0 if exact else max(share, share * abs(a)))
        for (a, exact), (b, other_exact) in zip(numbers, other_numbers, strict=True)
    )


def parts(line: str) -> tuple[str, list[tuple[float, bool]]]:
    """The words of a line, and its numbers with whether they are whole and have no unit."""
    for time in TIMES:
        line = re.sub(time, " TIME", line)
    numbers = [
        (
            float(number[0].replace(",", "")),
            "." not in number[0] and UNIT.match(line, number.end()) is None,
        )
        for number in NUMBER.finditer(line)
    ]
    return " ".join(NUMBER.sub("#", line).split()), numbers
