"""The demo's first chapter: a cheap model, a better one, and what perfect routing would achieve."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from pliant import nano
from pliant.cli.terminal import track
from pliant.nano import DIFFICULTIES, NAMES, Question
from pliant.reports import plots
from pliant.reports.page import Section
from pliant.reports.tables import Table

SMALL, LARGE = NAMES
RIGHT, WRONG = "✓ right", "✗"
READABLE = ("add", "multiply", "largest", "step", "subtract", "reverse")
"""The families whose questions need no explanation: they are shown first."""
SHOWN_FIRST = len(READABLE)
_LONGEST_PROMPT, _LONGEST_ANSWER = 34, 8  # to be read in a terminal of 80 columns


@dataclass(frozen=True)
class Answer:
    """A model's answer and its cost."""

    text: str
    right: bool
    flops: int
    milliseconds: float


@dataclass(frozen=True)
class Shown:
    """A question and each model's answer."""

    question: Question
    answers: dict[str, Answer]


@dataclass(frozen=True)
class TwoModels:
    """The results of the chapter."""

    shown: tuple[Shown, ...]
    questions: tuple[Question, ...]
    right: dict[str, tuple[bool, ...]]
    flops: dict[str, float]
    """The mean of the shown questions, by model."""
    parameters: dict[str, int]

    @property
    def difficulties(self) -> list[int]:
        return sorted({question.difficulty for question in self.questions})

    def share(self, name: str, difficulty: int | None = None) -> float:
        return self._share(self.right[name], difficulty)

    def perfect(self, difficulty: int | None = None) -> float:
        """The share that at least one model gets right: no router can do better."""
        both = zip(self.right[SMALL], self.right[LARGE], strict=True)
        return self._share([s or le for s, le in both], difficulty)

    def _share(self, right: Sequence[bool], difficulty: int | None) -> float:
        hits = [
            hit
            for q, hit in zip(self.questions, right, strict=True)
            if difficulty in (None, q.difficulty)
        ]
        return sum(hits) / len(hits)

    def needs_large(self) -> float:
        """The share of calls that a perfect router sends to the large model."""
        both = zip(self.right[SMALL], self.right[LARGE], strict=True)
        return sum(le and not s for s, le in both) / len(self.questions)

    def perfect_cost(self) -> float:
        """Its mean cost as a share of always asking the large model."""
        large = self.needs_large()
        return (large * self.flops[LARGE] + (1 - large) * self.flops[SMALL]) / self.flops[LARGE]

    def as_dict(self) -> dict[str, object]:
        """For JSON: of the questions only their number."""
        return {
            "shown": [asdict(shown) for shown in self.shown],
            "questions": len(self.questions),
            "accuracy": {name: self.share(name) for name in NAMES},
            "by_difficulty": {
                str(d): {name: self.share(name, d) for name in NAMES} for d in self.difficulties
            },
            "perfect_routing": {"accuracy": self.perfect(), "cost": self.perfect_cost()},
            "mean_flops": self.flops,
            "parameters": self.parameters,
        }


def measure(questions: int, seed: int) -> TwoModels:
    test = nano.questions("test", questions, seed)
    models = {name: nano.load(name) for name in NAMES}
    sample = _sample(test)
    shown = tuple(
        Shown(q, {name: _ask(*models[name], q) for name in NAMES})
        for q in track(sample, "asking one at a time")
    )
    right = {name: ask_all(*models[name], test, f"asking {name}") for name in NAMES}
    flops = {name: sum(s.answers[name].flops for s in shown) / len(shown) for name in NAMES}
    sizes = {name: model.num_parameters() for name, (model, _) in models.items()}
    return TwoModels(shown, tuple(test), right, flops, sizes)


def _sample(questions: Sequence[Question]) -> list[Question]:
    """One short question of each family, of the difficulties in turn; the readable ones first."""
    sample: list[Question] = []
    for i, family in enumerate(nano.TRAINED):
        wanted = DIFFICULTIES[i % len(DIFFICULTIES)]
        short = [q for q in questions if q.family == family.name and _is_short(q)]
        if short:
            sample.append(min(short, key=lambda q: abs(q.difficulty - wanted)))
    rank = {family: i for i, family in enumerate(READABLE)}
    return sorted(sample, key=lambda q: rank.get(q.family, len(rank)))


def _is_short(question: Question) -> bool:
    return len(question.prompt) <= _LONGEST_PROMPT and len(question.answer) <= _LONGEST_ANSWER


def _ask(model: Any, tokenizer: Any, question: Question) -> Answer:
    """The answer and the median time of three plain runs, and the FLOPs of a counted one."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        (text,) = nano.ask(model, tokenizer, [question.prompt])
        times.append(1000 * (time.perf_counter() - start))
    flops = counted_flops(lambda: nano.ask(model, tokenizer, [question.prompt]))
    return Answer(text, question.check(text), flops, median(times))


def counted_flops(run: Callable[[], Any]) -> int:
    """The floating-point operations of `run`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The plain kernel, because the counter cannot see into the fused kernels of a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def ask_all(
    model: Any, tokenizer: Any, questions: Sequence[Question], title: str
) -> tuple[bool, ...]:
    """Whether the model is right, for each question."""
    right: list[bool] = []
    batches = [questions[i : i + 100] for i in range(0, len(questions), 100)]
    for batch in track(batches, title):
        texts = nano.ask(model, tokenizer, [q.prompt for q in batch])
        right += [q.check(text) for q, text in zip(batch, texts, strict=True)]
    return tuple(right)


def section(measured: TwoModels) -> Section:
    """The chapter as sentences, tables and pictures."""
    return Section(
        "Two models, one question: who should answer?",
        sentences=_sentences(measured),
        tables=(answers_table(measured), difficulty_table(measured)),
        pictures=(
            (_accuracy_picture(measured), "Accuracy by difficulty, and with perfect routing."),
            (
                _cost_picture(measured),
                "Quality against cost: a router lies between the two.",
            ),
        ),
    )


def _sentences(measured: TwoModels) -> tuple[str, ...]:
    small, large = (f"{name} ({measured.parameters[name]:,} parameters)" for name in NAMES)
    ratio = measured.flops[LARGE] / measured.flops[SMALL]
    return (
        f"Of {len(measured.questions):,} test questions that neither was trained on, {small} gets "
        f"{measured.share(SMALL):.0%} right and {large} {measured.share(LARGE):.0%}, "
        f"at {ratio:.1f} times the cost.",
        f"Sending each question to the cheapest model that answers it correctly would get "
        f"{measured.perfect():.0%} right and cost {measured.perfect_cost():.0%} of always asking "
        f"{LARGE}: only {measured.needs_large():.0%} of the questions need it.",
        "This is an upper bound for any router on these questions. Cost is counted in "
        "floating-point operations, the mean over the first table's questions; the milliseconds "
        "are the median of three runs, and mostly overhead in models this small.",
    )


def answers_table(measured: TwoModels) -> Table:
    rows = [_answers_row(shown) for shown in measured.shown]
    colours = {cell: "red" for row in rows for cell in row if cell.startswith(WRONG)}
    return Table(
        f"One question of each family, asked alone (costs: {SMALL} / {LARGE})",
        ["question", "answer", SMALL, LARGE, "MFLOPs", "ms"],
        rows,
        right=frozenset(["MFLOPs", "ms"]),
        colours={RIGHT: "green", **colours},
        shown=SHOWN_FIRST,
    )


def _answers_row(shown: Shown) -> list[str]:
    answers = [shown.answers[name] for name in NAMES]
    flops = " / ".join(f"{answer.flops / 1e6:.1f}" for answer in answers)
    times = " / ".join(f"{answer.milliseconds:.0f}" for answer in answers)
    marks = [
        RIGHT if answer.right else f"{WRONG} {_short(answer.text) or '(nothing)'}"
        for answer in answers
    ]
    return [shown.question.prompt, shown.question.answer, *marks, flops, times]


def _short(text: str) -> str:
    return text if len(text) <= 12 else text[:11] + "…"


def difficulty_table(measured: TwoModels) -> Table:
    rows = []
    for d in (*measured.difficulties, None):
        n = sum(d in (None, q.difficulty) for q in measured.questions)
        figures = (measured.share(SMALL, d), measured.share(LARGE, d), measured.perfect(d))
        rows.append([str(d or "all"), f"{n:,}", *(f"{figure:.2f}" for figure in figures)])
    head = ["difficulty", "questions", SMALL, LARGE, "perfect routing"]
    return Table("Accuracy by difficulty", head, rows, right=frozenset(head[1:]))


def _accuracy_picture(measured: TwoModels) -> str:
    difficulties = measured.difficulties
    series = {name: [measured.share(name, d) for d in difficulties] for name in NAMES}
    series["perfect routing"] = [measured.perfect(d) for d in difficulties]
    roles: plots.Roles = {SMALL: "small", LARGE: "large", "perfect routing": "bound"}
    return plots.bars([str(d) for d in difficulties], series, roles, "difficulty", "accuracy")


def _cost_picture(measured: TwoModels) -> str:
    """Random routing is the straight line; perfect routing sends what only large gets right."""
    cheap = measured.flops[SMALL] / measured.flops[LARGE]
    small, large = (cheap, measured.share(SMALL)), (1.0, measured.share(LARGE))
    perfect = (measured.perfect_cost(), measured.perfect())
    lines = {
        "random routing": plots.Line.through([small, large], "control"),
        "perfect routing": plots.Line.through([small, perfect, large], "bound"),
    }
    marks = {SMALL: small, LARGE: large, "perfect": perfect}
    return plots.lines(lines, "cost (1 = always nano-l)", "accuracy", marks)
