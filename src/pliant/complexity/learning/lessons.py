"""From rows to what a scorer learns from: the prompts' ids and a tensor of labels, checked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pliant.complexity.config import GAIN, SCORE
from pliant.data import Duplicates, duplicates
from pliant.errors import InvalidInput
from pliant.prefill import Batch

if TYPE_CHECKING:
    from pliant.complexity.stored.prefixes import Stored

PROMPTS = ("input_ids", "messages", "prompt", "text")
LABELS = ("labels", "label")
Encode = Callable[[Sequence[Any]], Sequence[Any]]
"""Texts, message lists or ids -> the ids of each."""


class Lessons(Dataset[dict[str, Any]]):
    """Prompts and, where there are any, their labels."""

    def __init__(
        self,
        ids: Sequence[Tensor],
        labels: Tensor | None = None,
        texts: Sequence[str] = (),
        numbers: Sequence[int] = (),
    ) -> None:
        self.ids = tuple(ids)
        """Of each prompt, without padding and without [CPX]."""
        self.labels = labels
        """(n, outputs) probabilities, numbers or shares; (n,) classes."""
        self.texts = tuple(texts)
        """What duplicates are told by; the ids, where there are no texts."""
        self.numbers = tuple(numbers or range(len(self.ids)))
        """The row of each in the file that it came from, counted from 0."""
        self.stored: Stored | None = None
        """What was kept of the prompts; None where they are run anew."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"index": index, "lessons": self}
        if self.labels is not None:
            item["labels"] = self.labels[index]
        return item

    def take(self, indices: Sequence[int]) -> Lessons:
        """Some of them, in this order; nothing is stored of them yet."""
        labels = None if self.labels is None else self.labels[list(indices)]
        texts = [self.texts[i] for i in indices] if self.texts else ()
        numbers = [self.numbers[i] for i in indices]
        return Lessons([self.ids[i] for i in indices], labels, texts, numbers)

    def repeated(self, held: Lessons) -> Duplicates:
        """What of `held` is among these as well, by the rows that the files count."""
        found = duplicates(self.texts, held.texts)
        pairs = tuple((self.numbers[i], held.numbers[j]) for i, j in found.pairs)
        return replace(found, pairs=pairs)

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def collated(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch: labels, and either the stored prefixes or the ids, padded on the left."""
    lessons, indices = items[0]["lessons"], [item["index"] for item in items]
    batch: dict[str, Any] = {}
    if lessons.labels is not None:
        batch["labels"] = lessons.labels[indices]
    if lessons.stored is not None:
        return {**batch, "prefixes": lessons.stored.pick(indices).as_dict()}
    padded = Batch.of([lessons.ids[i] for i in indices])
    return {**batch, "input_ids": padded.ids_BT, "attention_mask": padded.mask_BT}


def lessons_of(
    rows: Iterable[Mapping[str, Any]],
    encode: Encode,
    *,
    loss: str = "bce",
    outputs: Sequence[str] = (SCORE,),
) -> Lessons:
    """Rows with a prompt (`prompt` or `text`, `messages` or `input_ids`) and a `label`."""
    rows = list(rows)
    if not rows:
        raise InvalidInput("there are no rows to learn from")
    prompt, label = _column(rows, PROMPTS, "prompt"), _column(rows, LABELS, "label", needed=False)
    prompts = [_value(row, prompt, i) for i, row in enumerate(rows)]
    labels = None
    if label:
        values = [_value(row, label, i) for i, row in enumerate(rows)]
        labels = labels_of(values, loss=loss, outputs=outputs)
    return Lessons(ids_of(encode(prompts)), labels, texts_of(prompts))


def texts_of(prompts: Iterable[Any]) -> tuple[str, ...]:
    """What two prompts are compared by: their text, messages or ids in writing."""
    return tuple(p if isinstance(p, str) else json.dumps(_plain(p)) for p in prompts)


def ids_of(prompts: Iterable[Any]) -> tuple[Tensor, ...]:
    """Each prompt's ids as a row of their own; an empty prompt is refused by its number."""
    made = []
    for i, ids in enumerate(prompts):
        row = torch.as_tensor(ids, dtype=torch.long).reshape(-1)
        if not len(row):
            raise InvalidInput(f"row {i + 1}: the prompt is empty: there is nothing to score")
        made.append(row)
    return tuple(made)


def labels_of(
    values: Sequence[Any], *, loss: str = "bce", outputs: Sequence[str] = (SCORE,)
) -> Tensor:
    """The labels as the loss takes them; the first that it cannot take is named with its row."""
    classes = len(outputs)
    if loss == "ce" and classes < 2:
        raise InvalidInput("ce needs two or more outputs, one for each class; or use bce")
    found = [_numbers(value, i) for i, value in enumerate(values)]
    if loss == "ce" and not any(isinstance(value, list) for value in found):
        return torch.tensor([_class(value, classes, i) for i, value in enumerate(found)])
    vectors = [_vector(value, loss, outputs, i) for i, value in enumerate(found)]
    return torch.tensor(vectors, dtype=torch.float32)


def _vector(value: float | list[float], loss: str, outputs: Sequence[str], row: int) -> list[float]:
    if loss == "ce" and not isinstance(value, list):
        which = _class(value, len(outputs), row)
        return [float(which == i) for i in range(len(outputs))]
    vector = value if isinstance(value, list) else [value]
    if len(vector) != len(outputs):
        raise _bad(row, value, f"{len(outputs)} numbers, one for each of {', '.join(outputs)}")
    for name, number in zip(outputs, vector, strict=True):
        low = -1.0 if name == GAIN else 0.0
        if loss != "regression" and not low <= number <= 1:
            raise _bad(row, value, f"a {name!r} from {low:g} to 1 (1 is hard, for a score)")
    if loss == "ce" and abs(sum(vector) - 1) > 1e-4:
        raise _bad(row, value, "shares of the classes that add up to 1")
    return vector


def _class(value: Any, num_labels: int, row: int) -> int:
    if value != int(value) or not 0 <= value < num_labels:
        raise _bad(row, value, f"a class from 0 to {num_labels - 1}")
    return int(value)


def _numbers(value: Any, row: int) -> float | list[float]:
    """A finite number, or a list of them; CSV gives both as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value.strip().lower())
        except ValueError:
            raise _bad(row, value, "a number, true or false, or a list of numbers") from None
    if hasattr(value, "tolist"):
        value = value.tolist()
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    for number in numbers:
        if not isinstance(number, (bool, int, float)) or not _finite(number):
            raise _bad(row, value, "a finite number, true or false, or a list of numbers")
    if not numbers:
        raise _bad(row, value, "a finite number, true or false, or a list of numbers")
    floats = [float(number) for number in numbers]
    return floats if isinstance(value, (list, tuple)) else floats[0]


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number that no float holds
        return False


def _plain(prompt: Any) -> Any:
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt


def _bad(row: int, value: Any, wanted: str) -> InvalidInput:
    return InvalidInput(f"row {row + 1}: label {value!r} cannot be used: give {wanted}")


def _column(
    rows: list[Mapping[str, Any]], names: tuple[str, ...], what: str, needed: bool = True
) -> str:
    for name in names:
        if name in rows[0]:
            return name
    if not needed:
        return ""
    raise InvalidInput(
        f"the rows have no {what} (looked for {', '.join(names)}); they have "
        f"{', '.join(map(str, rows[0])) or 'nothing'}"
    )


def _value(row: Mapping[str, Any], column: str, index: int) -> Any:
    if row.get(column) is None:
        raise InvalidInput(f"row {index + 1}: has no {column!r}")
    return row[column]
