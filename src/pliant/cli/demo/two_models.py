"""The demo's first chapter: a cheap model, a better one, and what perfect routing would give."""

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
_LONGEST_PROMPT, _LONGEST_ANSWER = 34, 8  # to be read in a terminal of 80 columns


@dataclass(frozen=True)
class Answer:
    """What one model said, and what that cost."""

    text: str
    right: bool
    flops: int
    milliseconds: float


@dataclass(frozen=True)
class Shown:
    """A question, and what each model made of it."""

    question: Question
    answers: dict[str, Answer]


@dataclass(frozen=True)
class TwoModels:
    """What the chapter found."""

    shown: tuple[Shown, ...]
    asked: tuple[Question, ...]
    right: dict[str, tuple[bool, ...]]
    flops: dict[str, float]
    """The mean of the shown questions, by model."""
    parameters: dict[str, int]

    @property
    def difficulties(self) -> list[int]:
        """Those that were asked."""
        return sorted({question.difficulty for question in self.asked})

    def share(self, name: str, difficulty: int | None = None) -> float:
        return self._share(self.right[name], difficulty)

    def perfect(self, difficulty: int | None = None) -> float:
        """The share that at least one of them gets right: no router can do better."""
        both = zip(self.right[SMALL], self.right[LARGE], strict=True)
        return self._share([s or le for s, le in both], difficulty)

    def _share(self, right: Sequence[bool], difficulty: int | None) -> float:
        hits = [
            hit
            for q, hit in zip(self.asked, right, strict=True)
            if difficulty in (None, q.difficulty)
        ]
        return sum(hits) / len(hits)

    def needs_large(self) -> float:
        """The share of calls that a perfect router sends to the large model."""
        both = zip(self.right[SMALL], self.right[LARGE], strict=True)
        return sum(le and not s for s, le in both) / len(self.asked)

    def perfect_cost(self) -> float:
        """Its mean cost as a share of always asking the large model."""
        large = self.needs_large()
        return (large * self.flops[LARGE] + (1 - large) * self.flops[SMALL]) / self.flops[LARGE]

    def as_dict(self) -> dict[str, object]:
        """For JSON: of the questions only their number."""
        return {
            "shown": [asdict(shown) for shown in self.shown],
            "questions": len(self.asked),
            "accuracy": {name: self.share(name) for name in NAMES},
            "by_difficulty": {
                str(d): {name: self.share(name, d) for name in NAMES} for d in self.difficulties
            },
            "perfect_routing": {"accuracy": self.perfect(), "cost": self.perfect_cost()},
            "mean_flops": self.flops,
            "parameters": self.parameters,
        }


def measure(questions: int, seed: int) -> TwoModels:
    asked = nano.questions("test", questions, seed)
    models = {name: nano.load(name) for name in NAMES}
    spread = _spread(asked)
    shown = tuple(
        Shown(q, {name: _ask_one(*models[name], q) for name in NAMES})
        for q in track(spread, "asking one at a time")
    )
    right = {name: ask_all(*models[name], asked, f"asking {name}") for name in NAMES}
    flops = {name: sum(s.answers[name].flops for s in shown) / len(shown) for name in NAMES}
    sizes = {name: model.num_parameters() for name, (model, _) in models.items()}
    return TwoModels(shown, tuple(asked), right, flops, sizes)


def _spread(asked: Sequence[Question]) -> list[Question]:
    """One question a family, the difficulties in turn, none too long to read."""
    spread: list[Question] = []
    for i, family in enumerate(nano.TRAINED):
        wanted = DIFFICULTIES[i % len(DIFFICULTIES)]
        short = [q for q in asked if q.family == family.name and _is_short(q)]
        if short:
            spread.append(min(short, key=lambda q: abs(q.difficulty - wanted)))
    return spread


def _is_short(question: Question) -> bool:
    return len(question.prompt) <= _LONGEST_PROMPT and len(question.answer) <= _LONGEST_ANSWER


def _ask_one(model: Any, tokenizer: Any, question: Question) -> Answer:
    """Answer and milliseconds from a plain run (the median of three), FLOPs from a counted one."""
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        (text,) = nano.ask(model, tokenizer, [question.prompt])
        times.append(1000 * (time.perf_counter() - begun))
    flops = counted_flops(lambda: nano.ask(model, tokenizer, [question.prompt]))
    return Answer(text, question.check(text), flops, median(times))


def counted_flops(run: Callable[[], Any]) -> int:
    """The floating-point operations of `run`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The plain kernel, because the counter does not see into the fused ones of a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def ask_all(model: Any, tokenizer: Any, asked: Sequence[Question], doing: str) -> tuple[bool, ...]:
    """Whether the model is right, question by question."""
    right: list[bool] = []
    batches = [asked[i : i + 100] for i in range(0, len(asked), 100)]
    for batch in track(batches, doing):
        said = nano.ask(model, tokenizer, [q.prompt for q in batch])
        right += [q.check(text) for q, text in zip(batch, said, strict=True)]
    return tuple(right)


def section(found: TwoModels) -> Section:
    """The chapter as sentences, tables and pictures."""
    return Section(
        "Two models, one question: who should answer?",
        sentences=_sentences(found),
        tables=(answers_table(found), difficulty_table(found)),
        pictures=(
            (_accuracy_picture(found), "Accuracy by difficulty, and with perfect routing."),
            (_cost_picture(found), "Quality against cost: between the two models lies a router."),
        ),
    )


def _sentences(found: TwoModels) -> tuple[str, ...]:
    small, large = (f"{name} ({found.parameters[name]:,} parameters)" for name in NAMES)
    ratio = found.flops[LARGE] / found.flops[SMALL]
    return (
        f"Of {len(found.asked):,} test questions that neither was trained on, {small} gets "
        f"{found.share(SMALL):.0%} right and {large} {found.share(LARGE):.0%}, "
        f"at {ratio:.1f} times the cost.",
        f"Sending each question to the cheapest model that answers it rightly would get "
        f"{found.perfect():.0%} right and cost {found.perfect_cost():.0%} of always asking "
        f"{LARGE}: only {found.needs_large():.0%} of the questions need it.",
        "That is the most that any router could do on these questions, not what one does. Cost is "
        "counted in floating-point operations, the mean of the first table's questions; the "
        "milliseconds are the median of three runs, and mostly overhead in models this small.",
    )


def answers_table(found: TwoModels) -> Table:
    rows = [_answers_row(shown) for shown in found.shown]
    colours = {cell: "red" for row in rows for cell in row if cell.startswith(WRONG)}
    return Table(
        f"One question of each family, asked alone (costs: {SMALL} / {LARGE})",
        ["question", "answer", SMALL, LARGE, "MFLOPs", "ms"],
        rows,
        right=frozenset(["MFLOPs", "ms"]),
        colours={RIGHT: "green", **colours},
    )


def _answers_row(shown: Shown) -> list[str]:
    answers = [shown.answers[name] for name in NAMES]
    flops = " / ".join(f"{answer.flops / 1e6:.1f}" for answer in answers)
    times = " / ".join(f"{answer.milliseconds:.0f}" for answer in answers)
    said = [
        RIGHT if answer.right else f"{WRONG} {_short(answer.text) or '(nothing)'}"
        for answer in answers
    ]
    return [shown.question.prompt, shown.question.answer, *said, flops, times]


def _short(text: str) -> str:
    return text if len(text) <= 12 else text[:11] + "…"


def difficulty_table(found: TwoModels) -> Table:
    rows = []
    for d in (*found.difficulties, None):
        n = sum(d in (None, q.difficulty) for q in found.asked)
        figures = (found.share(SMALL, d), found.share(LARGE, d), found.perfect(d))
        rows.append([str(d or "all"), f"{n:,}", *(f"{figure:.2f}" for figure in figures)])
    head = ["difficulty", "questions", SMALL, LARGE, "perfect routing"]
    return Table("Accuracy by difficulty", head, rows, right=frozenset(head[1:]))


def _accuracy_picture(found: TwoModels) -> str:
    asked = found.difficulties
    series = {name: [found.share(name, d) for d in asked] for name in NAMES}
    series["perfect routing"] = [found.perfect(d) for d in asked]
    return plots.bars([str(d) for d in asked], series, "difficulty", "accuracy")


def _cost_picture(found: TwoModels) -> str:
    """Random routing is the straight line; a perfect router first sends what only large saves."""
    cheap = found.flops[SMALL] / found.flops[LARGE]
    small, large = (cheap, found.share(SMALL)), (1.0, found.share(LARGE))
    perfect = (found.perfect_cost(), found.perfect())
    lines = {"random routing": [small, large], "perfect routing": [small, perfect, large]}
    marks = {SMALL: small, LARGE: large, "perfect": perfect}
    return plots.curve(lines, marks, "cost (1 = always nano-l)", "accuracy")
