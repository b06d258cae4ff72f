"""The demo's fourth chapter: nano-l without a quarter of its channels, and what it still knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pliant import nano
from pliant.cli.demo.two_models import LARGE, RIGHT, SHOWN_FIRST, WRONG, TwoModels, ask_all
from pliant.cli.importance import heat_map
from pliant.reports.page import KeyFigure, Section
from pliant.reports.tables import Table
from pliant.structure import (
    Importance,
    ImportanceConfig,
    PruneConfig,
    calibration_batches,
    export,
    importance,
    perplexity,
    prune,
)

SHARE = 0.25
WAYS = {
    "compensated": PruneConfig(channels=SHARE),
    "magnitude": PruneConfig(channels=SHARE, score="magnitude", compensate=False),
    "random": PruneConfig(channels=SHARE, score="random", compensate=False),
}
QUESTIONS, TOKENS, LENGTH = 600, 6_000, 96
HELD_OUT = 4  # of the batches, one in so many measures the perplexity


@dataclass(frozen=True)
class Smaller:
    """The results of the chapter."""

    parameters: dict[str, int]
    """Of the whole model and of the one that was written."""
    perplexities: dict[str, float]
    accuracies: dict[str, float]
    """Of the whole model and of the one that was written and loaded by transformers alone."""
    difference: float
    """Between logits of the model that was written and of the pruned one."""
    answers: tuple[tuple[str, str, bool], ...]
    """Questions, what the smaller model says, and whether it is right."""
    importance: Importance

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "importance"}


def measure(measured: TwoModels) -> Smaller:
    """Prune a fresh nano-l, write it, and ask what the first chapter asked."""
    model, tokenizer = nano.load(LARGE)
    model.requires_grad_(False)
    rows = nano.conversations("train", QUESTIONS)
    batches = calibration_batches(rows, tokenizer, tokens=TOKENS, length=LENGTH)
    held_out = batches[::HELD_OUT]
    fitted = [batch for i, batch in enumerate(batches) if i % HELD_OUT]
    scores = importance(model, fitted, ImportanceConfig(("heads", "channels"), "activation"))
    perplexities = {"whole": perplexity(model, held_out)}
    pruned = None
    for name, config in reversed(WAYS.items()):
        if pruned is not None:
            pruned.detach()
        pruned = prune(model, fitted, config)
        perplexities[name] = perplexity(model, held_out)
    with _written(model, tokenizer) as (smaller, result):
        right = ask_all(smaller, tokenizer, measured.questions, f"asking the smaller {LARGE}")
        shown = [s.question for s in measured.shown]
        texts = nano.ask(smaller, tokenizer, [question.prompt for question in shown])
    return Smaller(
        parameters={"whole": result.parameters_before, "smaller": result.parameters},
        perplexities=perplexities,
        accuracies={"whole": measured.share(LARGE), "smaller": sum(right) / len(right)},
        difference=result.difference,
        answers=tuple(
            (question.prompt, text, question.check(text))
            for question, text in zip(shown, texts, strict=True)
        ),
        importance=scores,
    )


@contextmanager
def _written(model: Any, tokenizer: Any) -> Iterator[tuple[Any, Any]]:
    """The exported model, as plain transformers loads it, and the export's result."""
    from transformers import AutoModelForCausalLM

    with TemporaryDirectory() as folder:
        result = export(model, Path(folder) / "smaller", tokenizer)
        yield AutoModelForCausalLM.from_pretrained(result.folder).eval(), result


def figure(results: Smaller) -> KeyFigure:
    after, before = results.parameters["smaller"], results.parameters["whole"]
    right = results.accuracies
    note = f"right answers: {right['whole']:.1%} before, {right['smaller']:.1%} after"
    return KeyFigure("smaller by", f"{1 - after / before:.0%}", note)


def section(results: Smaller) -> Section:
    """The chapter as sentences, a table and a picture."""
    caption = "How much each head and channel contributes: activation times weight."
    return Section(
        "Which parts does a model need?",
        sentences=_sentences(results),
        tables=(_answers(results),),
        pictures=((heat_map(results.importance), caption),),
    )


def _sentences(results: Smaller) -> tuple[str, ...]:
    before, after = results.parameters["whole"], results.parameters["smaller"]
    lost = {name: results.perplexities[name] / results.perplexities["whole"] for name in WAYS}
    return (
        f"{LARGE} loses a quarter of its MLP channels, those that the others can best do without, "
        f"and the others take over what they can: {before:,} parameters become {after:,}. "
        f"Perplexity on held-out questions is multiplied by {lost['compensated']:.3f}. If nothing "
        f"takes over, by {lost['magnitude']:.3f} without the smallest weights, and by "
        f"{lost['random']:.2f} without a random quarter. {LARGE} has channels to spare: the heat "
        "map shows how many of each layer do next to nothing.",
        f"It is written as a stock checkpoint that plain transformers loads (its logits differ by "
        f"{results.difference:.0e}) and answers {results.accuracies['smaller']:.1%} of the first "
        f"chapter's questions correctly; the whole {LARGE} {results.accuracies['whole']:.1%}.",
    )


def _answers(results: Smaller) -> Table:
    rows = [
        [prompt, RIGHT if right else f"{WRONG} {text or '(nothing)'}"]
        for prompt, text, right in results.answers
    ]
    colours = {cell: "red" for row in rows for cell in row if cell.startswith(WRONG)}
    head = ["question", f"the smaller {LARGE}"]
    colours = {RIGHT: "green", **colours}
    return Table("The smaller model answers", head, rows, colours=colours, shown=SHOWN_FIRST)
