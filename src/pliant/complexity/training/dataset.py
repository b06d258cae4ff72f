"""The data set that a scorer learns from: prompts' ids and labels, checked; and their order."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from pliant.complexity.config import GAIN, SCORE
from pliant.complexity.prompts import Truncation, checked
from pliant.complexity.prompts import ids_of as tokenized
from pliant.data import Duplicates, duplicates
from pliant.errors import InvalidInput
from pliant.prefill import Batch

if TYPE_CHECKING:
    from pliant.complexity.model import Complexity
    from pliant.complexity.prefix_cache.store import PrefixStore

PROMPTS = ("input_ids", "messages", "prompt", "text")
LABELS = ("labels", "label")
Encode = Callable[[Sequence[Any]], Sequence[Any]]
"""Texts, message lists or ids -> the ids of each."""


class PromptDataset(Dataset[dict[str, Any]]):
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
        """Compared to find duplicates; the ids, where there are no texts."""
        self.numbers = tuple(numbers or range(len(self.ids)))
        """The row of each in its file, counted from 0."""
        self.stored: PrefixStore | None = None
        """The prompts' keys and values; None where they are computed anew."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"index": index, "dataset": self}
        if self.labels is not None:
            item["labels"] = self.labels[index]
        return item

    def select(self, indices: Sequence[int]) -> PromptDataset:
        """These rows, in this order, without stored prefixes."""
        labels = None if self.labels is None else self.labels[list(indices)]
        texts = [self.texts[i] for i in indices] if self.texts else ()
        numbers = [self.numbers[i] for i in indices]
        return PromptDataset([self.ids[i] for i in indices], labels, texts, numbers)

    def duplicates(self, held_out: PromptDataset) -> Duplicates:
        """The prompts that are in `held_out` as well, by their rows in the files."""
        repeated = duplicates(self.texts, held_out.texts)
        pairs = tuple((self.numbers[i], held_out.numbers[j]) for i, j in repeated.pairs)
        return replace(repeated, pairs=pairs)

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch: labels, and either the stored prefixes or the ids, padded on the left."""
    dataset, indices = items[0]["dataset"], [item["index"] for item in items]
    batch: dict[str, Any] = {}
    if dataset.labels is not None:
        batch["labels"] = dataset.labels[indices]
    if dataset.stored is not None:
        return {**batch, "prefixes": dataset.stored.batch(indices).as_dict()}
    padded = Batch.of([dataset.ids[i] for i in indices])
    return {**batch, "input_ids": padded.ids_BT, "attention_mask": padded.mask_BT}


def dataset_of(
    rows: Iterable[Mapping[str, Any]],
    encode: Encode,
    *,
    loss: str = "bce",
    outputs: Sequence[str] = (SCORE,),
) -> PromptDataset:
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
    return PromptDataset(ids_of(encode(prompts)), labels, texts_of(prompts))


def encode(
    scorer: Complexity,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    max_length: int | None = None,
    truncation: Truncation | None = None,
) -> list[list[int]]:
    """The ids of each prompt, without a [CPX] at its end, which is never in the vocabulary."""
    ids = tokenized(prompts, tokenizer)
    limits = [limit for limit in (max_length, scorer.max_prompt_length) if limit is not None]
    table = getattr(scorer.anatomy.embeddings, "num_embeddings", None)
    return checked(ids, min(limits, default=None), truncation, table)


def texts_of(prompts: Iterable[Any]) -> tuple[str, ...]:
    """What duplicates are compared by: the text, or messages and ids as JSON."""
    return tuple(p if isinstance(p, str) else json.dumps(plain(p)) for p in prompts)


def ids_of(prompts: Iterable[Any]) -> tuple[Tensor, ...]:
    """A tensor for each prompt; an empty prompt is refused by its row."""
    tensors = []
    for i, ids in enumerate(prompts):
        row = torch.as_tensor(ids, dtype=torch.long).reshape(-1)
        if not len(row):
            raise InvalidInput(f"row {i + 1}: the prompt is empty: there is nothing to score")
        tensors.append(row)
    return tuple(tensors)


def labels_of(
    values: Sequence[Any], *, loss: str = "bce", outputs: Sequence[str] = (SCORE,)
) -> Tensor:
    """The labels as the loss reads them; an unusable label is named with its row."""
    classes = len(outputs)
    if loss == "ce" and classes < 2:
        raise InvalidInput("ce needs two or more outputs, one for each class; or use bce")
    numbers = [_numbers(value, i) for i, value in enumerate(values)]
    if loss == "ce" and not any(isinstance(value, list) for value in numbers):
        return torch.tensor([_class(value, classes, i) for i, value in enumerate(numbers)])
    vectors = [_vector(value, loss, outputs, i) for i, value in enumerate(numbers)]
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
    value = plain(value)
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    if not numbers or not all(map(_is_finite, numbers)):
        raise _bad(row, value, "a finite number, true or false, or a list of numbers")
    floats = [float(number) for number in numbers]
    return floats if isinstance(value, (list, tuple)) else floats[0]


def _is_finite(number: Any) -> bool:
    """Also whether a float can hold a whole number."""
    return isinstance(number, (int, float)) and abs(number) <= sys.float_info.max


def plain(value: Any) -> Any:
    """Without tensors and arrays: as lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


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


# --- the order of a training ---------------------------------------------------------------------

POOL = 50  # batches: enough for similar lengths, much less than an epoch of a large data set


class SimilarLengthSampler(Sampler[int]):
    """A random order in which prompts of similar length share a batch: its longest is its width.

    Prompts are shuffled, divided into pools of many batches, sorted by length within each pool and
    divided into batches, which are shuffled again. So the prompts of a batch change every epoch.
    The order is the same for one seed and epoch, so that a run resumes exactly.
    """

    def __init__(
        self, lengths: Sequence[int], batch: int, seed: int, epoch: Callable[[], int]
    ) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch = batch
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(similar_length_order(self.lengths, self.batch, self.seed, self.epoch()))


def similar_length_order(lengths: Tensor, batch: int, seed: int, epoch: int) -> list[int]:
    """All prompts once; each run of `batch` of them is a batch, and the remainder comes last."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    shuffled = torch.randperm(len(lengths), generator=generator)
    full = len(shuffled) // batch * batch
    batches: list[Tensor] = []
    for pool in shuffled[:full].split(batch * POOL):
        batches += pool[lengths[pool].argsort(stable=True)].split(batch)
    order = torch.randperm(len(batches), generator=generator).tolist()
    return torch.cat([*(batches[i] for i in order), shuffled[full:]]).tolist()
