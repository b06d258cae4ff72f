"""`pliant demo --real`: a real small model on real English, Python's own language reference.

Three chapters: it reads a score from the prefill of its own generation, without changing a token; a
scorer learns, on the spot, which passages the model will find hard to continue; and the model
trains on the passages, on all tokens or on those that are worth a gradient.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pliant.cli.gradients.audit import RACE_CAPTION, race_picture, race_table
from pliant.cli.gradients.show import coloured
from pliant.cli.terminal import track
from pliant.complexity import Complexity, CPXConfig, attach, fit
from pliant.data.collate import Collator
from pliant.gradients import GradientConfig
from pliant.gradients.audit import Contender, Race, race, show
from pliant.reports.page import Coloured, KeyFigure, Section
from pliant.reports.tables import Table
from pliant.stats import Band, auc, paired

MODEL = "smollm2-135m"
PROMPT, NEXT = 48, 48
"""The tokens of a passage that the scorer sees, and those that follow."""
TRAINING, TEST, BATCH = 160, 80, 8
NEW_TOKENS, ROUNDS, SEEDS, HELD_OUT = 32, 3, 3, 16
CONFIG = GradientConfig()
QUESTION = "In one paragraph: what is a Python generator, and when is it better than a list?"


# --- chapter 1: a score from the model's own prefill ---------------------------------------------


@dataclass(frozen=True)
class Scored:
    """One generation, with a score and without."""

    answer: str
    identical: bool
    """Whether the tokens are those of the plain generation."""
    ratio: float
    """Its time, relative to the plain generation: the median of paired runs."""
    separate: float
    """The same for a score in a forward pass of its own, before generating."""


def generate(model: Any, tokenizer: Any) -> Scored:
    """Generate the answer to one question in three ways, in turn."""
    scorer = attach(model, CPXConfig(), tokenizer)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    mask = torch.ones_like(ids)
    runs: dict[str, Callable[[], Any]] = {
        "plain": lambda: model.generate(ids, attention_mask=mask, **options),
        "scored": lambda: scorer.generate(ids, **options).outputs,
        "separate": lambda: (scorer.score(ids.tolist()), runs["plain"]()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    outputs = {}
    for _ in track(range(ROUNDS), "generating"):
        for name, run in runs.items():
            began = time.process_time()
            outputs[name] = run()
            seconds[name].append(time.process_time() - began)
    scorer.detach()
    plain = outputs["plain"]
    return Scored(
        tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True),
        bool(torch.equal(outputs["scored"][0], plain)),
        _ratio(seconds["scored"], seconds["plain"]),
        _ratio(seconds["separate"], seconds["plain"]),
    )


def _ratio(ours: list[float], control: list[float]) -> float:
    return float(np.median(np.divide(ours, control)))


# --- chapter 2: which passages will be hard? -----------------------------------------------------


@dataclass(frozen=True)
class Difficulty:
    """How well a passage's next tokens are foreseen to be hard: AUROC on held-out passages."""

    scorer: float
    prompt_loss: float
    """The control: the model's own loss on the prompt."""
    more: Band
    """How much more the scorer's is, with a band over the passages."""
    passages: tuple[int, int]
    """To train on, and to measure on."""
    seconds: float


def foresee(model: Any, tokenizer: Any, passages: Tensor) -> Difficulty:
    """Train a scorer to tell, from the prompt, whether what follows has a high loss."""
    losses = _losses(model, passages)
    prompt, following = losses[:, : PROMPT - 1].mean(1), losses[:, PROMPT - 1 :].mean(1)
    hard = (following > following[:TRAINING].median()).float().numpy()
    prompts = [row.tolist() for row in passages[:, :PROMPT]]
    scorer = attach(model, CPXConfig(lora_rank=4), tokenizer)
    began = time.perf_counter()
    fit(scorer, prompts[:TRAINING], hard[:TRAINING], num_epochs=6, learning_rate=3e-3)
    seconds = time.perf_counter() - began
    scores = _scores(scorer, prompts[TRAINING:])
    scorer.detach()
    truth, control = hard[TRAINING:], prompt[TRAINING:].double().numpy()

    def auc_of(values: NDArray[Any]) -> Callable[[NDArray[Any]], float]:
        return lambda rows: auc(values[rows], truth[rows])

    more = paired(auc_of(scores), auc_of(control), len(truth))
    numbers = (TRAINING, len(truth))
    return Difficulty(auc(scores, truth), auc(control, truth), more, numbers, seconds)


@torch.inference_mode()
def _losses(model: Any, passages: Tensor) -> Tensor:
    """(n, T - 1): the model's loss on each token but the first."""
    rows = []
    for ids in track(passages.split(BATCH), "reading passages"):
        logits = model(ids).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        rows.append(loss.view(len(ids), -1))
    return torch.cat(rows)


def _scores(scorer: Complexity, prompts: list[list[int]]) -> NDArray[Any]:
    batches = [prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH)]
    return np.concatenate([scorer.score(batch).score for batch in batches])


# --- chapter 3: which tokens are worth a gradient? -----------------------------------------------


def train(model: Any, tokenizer: Any, passages: Tensor, steps: int) -> tuple[Race, Any]:
    """Train on the passages in two ways, with the same operations, from the same weights."""
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in passages]
    model.requires_grad_(True).train()
    raced = race(
        model,
        rows[:TRAINING],
        rows[TRAINING : TRAINING + HELD_OUT],
        CONFIG,
        steps=steps,
        seeds=SEEDS,
        points=2,
        batch_size=BATCH // 2,
        lr=1e-4,
        contenders=[Contender("tokens", CONFIG)],
        progress=track,
    )
    shown = show(model, Collator.of(tokenizer)(rows[:2]), CONFIG)
    return raced, coloured(shown, tokenizer)


# --- the whole -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Real:
    """The results of the three chapters."""

    scored: Scored
    difficulty: Difficulty
    race: Race
    coloured: tuple[Coloured, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "score + generate": asdict(self.scored),
            "difficulty": asdict(self.difficulty),
            "tokens": self.race.as_dict(),
        }


def measure(model: Any, tokenizer: Any, steps: int, seed: int) -> Real:
    passages = passages_of(tokenizer, TRAINING + TEST, seed)
    model.requires_grad_(False)
    scored = generate(model, tokenizer)
    difficulty = foresee(model, tokenizer, passages)
    raced, texts = train(model, tokenizer, passages, steps)
    return Real(scored, difficulty, raced, tuple(texts))


def passages_of(tokenizer: Any, count: int, seed: int) -> Tensor:
    """(count, PROMPT + NEXT) passages of Python's language reference, which comes with Python."""
    from pydoc_data.topics import topics

    length = PROMPT + NEXT
    pieces = [
        ids[i : i + length]
        for text in topics.values()
        for ids in [tokenizer(" ".join(text.split()), add_special_tokens=False).input_ids]
        for i in range(0, len(ids) - length + 1, length)
    ]
    return torch.tensor(random.Random(seed).sample(pieces, count))


def sections(results: Real, name: str) -> list[Section]:
    scored, difficulty = results.scored, results.difficulty
    trained, tested = difficulty.passages
    return [
        Section(
            "A score from the prefill that an answer needs anyway",
            sentences=(
                f"{name} answers: {QUESTION}",
                f"“{scored.answer.strip()} ...”",
                f"With a [CPX] score read from the same prefill it generated "
                f"{'the same tokens' if scored.identical else 'OTHER TOKENS'} in "
                f"{scored.ratio:.2f} times the time; a score in a forward pass of its own took "
                f"{scored.separate:.2f} times.",
            ),
        ),
        Section(
            "Which passages will be hard to continue?",
            sentences=(
                f"Passages of Python's language reference: from the first {PROMPT} tokens, is the "
                f"model's loss on the next {NEXT} above the median? A scorer learned it from "
                f"{trained} passages in {difficulty.seconds:.0f} s and was measured on {tested}.",
                _verdict(difficulty),
            ),
            tables=(
                Table(
                    "AUROC: .5 is chance, 1 is perfect",
                    ["predicted by", "AUROC"],
                    [
                        ["[CPX], from the prefill", f"{difficulty.scorer:.3f}"],
                        ["the model's loss on the prompt", f"{difficulty.prompt_loss:.3f}"],
                    ],
                    right=frozenset({"AUROC"}),
                ),
            ),
        ),
        Section(
            "Which tokens are worth a gradient?",
            sentences=(results.race.sentence,),
            tables=(race_table(results.race),),
            pictures=((race_picture(results.race), RACE_CAPTION),),
            texts=results.coloured,
        ),
    ]


def figures(results: Real) -> tuple[KeyFigure, ...]:
    """One for each chapter."""
    scored, difficulty, raced = results.scored, results.difficulty, results.race
    gain = raced.gain(raced.runs[0])
    return (
        KeyFigure("a score while answering", f"{scored.ratio:.2f}x", "the time of answering alone"),
        KeyFigure(
            "hard passages, AUROC",
            f"{difficulty.scorer:.2f}",
            f"the model's own loss on the prompt {difficulty.prompt_loss:.2f}",
        ),
        KeyFigure("selected tokens gain", f"{gain.value:+.2f}", "nats a token, over standard"),
    )


def _verdict(difficulty: Difficulty) -> str:
    band = difficulty.more
    if not band.excludes(0):
        return f"More than the model's own loss on the prompt: {band}: not significant."
    better = "better" if band.value > 0 else "worse"
    return f"That is {better} than the model's own loss on the prompt: by {band}."
