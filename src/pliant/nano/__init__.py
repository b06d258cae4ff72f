"""Two tiny embedded models, and the world of verifiable questions that they were trained on.

from pliant import nano

model, tokenizer = nano.load("nano-s")
questions = nano.questions("test", n=100, seed=0)
answers = nano.ask(model, tokenizer, [question.prompt for question in questions])
right = sum(question.check(answer) for question, answer in zip(questions, answers))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pliant import loading
from pliant.data import chat_text, check_text
from pliant.errors import InvalidInput, ModelNotFound
from pliant.nano.families import DIFFICULTIES, HELD_OUT, TRAINED, WORDINGS, Family, Question
from pliant.nano.world import conversations, questions, stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAMES = ("nano-s", "nano-l")
_LONGEST_ANSWER = 24  # tokens: the longest right answer has 22 letters and an end
_TOKENS_A_BATCH = 8_192

__all__ = [
    "DIFFICULTIES",
    "HELD_OUT",
    "NAMES",
    "TRAINED",
    "WORDINGS",
    "Family",
    "Question",
    "ask",
    "conversations",
    "load",
    "path",
    "questions",
    "stream",
]


def path(name: str) -> Path:
    """The folder of an embedded checkpoint, for plain `AutoModelForCausalLM.from_pretrained`."""
    if name not in NAMES:
        raise ModelNotFound(f"no embedded model is called {name!r}; there are {', '.join(NAMES)}")
    return loading.WEIGHTS / name


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An embedded model in fp32 and eval mode, and its tokenizer."""
    return loading.load(path(name))


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> list[str]:
    """The model's greedy answers, in the order of the prompts, by plain `generate`.

    A prompt is plain text. One that contains a special token of the chat template could forge an
    answer, so it is refused; so is one that leaves no space for an answer in the context.
    """
    import torch

    if len(prompts) == 0:
        return []
    _check_prompts(prompts, tokenizer.all_special_tokens)
    answers = [""] * len(prompts)
    texts = [chat_text([{"role": "user", "content": prompt}], tokenizer) for prompt in prompts]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    _check_lengths(lengths, getattr(model.config, "max_position_embeddings", None))
    for rows in by_length(lengths, _TOKENS_A_BATCH):
        batch = tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True)
        with torch.inference_mode():
            out = model.generate(
                **batch.to(model.device), max_new_tokens=_LONGEST_ANSWER, do_sample=False
            )
        new = out[:, batch["input_ids"].shape[1] :]
        decoded = tokenizer.batch_decode(new, skip_special_tokens=True)
        for i, text in zip(rows, decoded, strict=True):
            answers[i] = text
    return answers


def _check_prompts(prompts: Sequence[str], special_tokens: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise InvalidInput("prompts is one text; give a list: [prompt]")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InvalidInput(f"prompt {i} is of type {type(prompt).__name__}; prompts are texts")
        token = next((token for token in special_tokens if token in prompt), None)
        if token is not None:
            raise InvalidInput(
                f"prompt {i} contains {token!r}, a special token of the chat template"
            )
        check_text(prompt, f"prompt {i}")


def _check_lengths(lengths: Sequence[int], context: int | None) -> None:
    if context is not None and max(lengths) + _LONGEST_ANSWER > context:
        i = max(range(len(lengths)), key=lengths.__getitem__)
        raise InvalidInput(
            f"prompt {i} has {lengths[i]:,} tokens with the chat template; with an answer of "
            f"{_LONGEST_ANSWER} at most {context - _LONGEST_ANSWER:,} fit the context"
        )


def by_length(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """The indices in batches of similar lengths, of at most `tokens` padded tokens if it can be."""
    rows: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if rows and (len(rows) + 1) * lengths[i] > tokens:
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows
