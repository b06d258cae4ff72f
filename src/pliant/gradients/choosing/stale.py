"""Scores of an earlier visit, kept by example: to score one again only every so often.

    found = scores.recall(ids, valid_BT)
    fresh = ...                                   # of the rows that are due, or of all
    difficulty_BT = torch.where(found.due_B[:, None], fresh, found.difficulty_BT)
    scores.keep(ids, fresh, valid_BT, found.due_B)

Only labelled positions are kept, in fp16 and on the CPU, so that padding plays no part; an example
that comes with another number of them is another one, and scored again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pliant.errors import InvalidInput

ROOM = 100_000_000
"""Tokens kept at most: 200 MB. Beyond, the examples that were scored longest ago are dropped."""


@dataclass(frozen=True, eq=False)
class Recalled:
    difficulty_BT: Tensor
    """The last scores in fp32; 0 where there is no label, and in rows that are due."""
    due_B: Tensor
    """Which rows have to be scored now."""


@dataclass
class _Kept:
    scores: Tensor
    visits: int


class StaleScores:
    """The last scores of each example, which stand for `refresh` visits."""

    def __init__(self, refresh: int, room: int = ROOM) -> None:
        if refresh < 1 or room < 1:
            raise InvalidInput(f"refresh = {refresh}, room = {room}: give 1 or more")
        self.refresh = refresh
        self.room = room
        self.tokens = 0
        self._kept: OrderedDict[int, _Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def recall(self, ids_B: Tensor, valid_BT: Tensor) -> Recalled:
        """What is known of these examples; a visit is counted. (It waits for the device.)"""
        valid = _matching(ids_B, valid_BT)
        difficulty_BT = torch.zeros(valid.shape, dtype=torch.float32)
        due = []
        for row, example in enumerate(ids_B.tolist()):
            kept = self._kept.get(example)
            count = int(valid[row].sum())
            due.append(kept is None or kept.visits >= self.refresh or len(kept.scores) != count)
            if kept is not None and not due[-1]:
                kept.visits += 1
                difficulty_BT[row, valid[row]] = kept.scores.float()
        device = valid_BT.device
        return Recalled(difficulty_BT.to(device), torch.tensor(due, dtype=torch.bool).to(device))

    def keep(self, ids_B: Tensor, difficulty_BT: Tensor, valid_BT: Tensor, due_B: Tensor) -> None:
        """Remember the scores of the rows that were due: this was their first visit."""
        valid = _matching(ids_B, valid_BT)
        most = torch.finfo(torch.float16).max
        halved = torch.nan_to_num(difficulty_BT.detach().float(), nan=0.0).clamp(-most, most)
        halved = halved.half().cpu()
        for row, (example, due) in enumerate(zip(ids_B.tolist(), due_B.tolist(), strict=True)):
            if due:
                self._drop(example)
                self._add(example, _Kept(halved[row][valid[row]], visits=1))

    def state(self) -> dict[str, Tensor]:
        """All of it as four tensors, for safetensors; the oldest first."""
        kept = list(self._kept.values())
        return {
            "ids": torch.tensor(list(self._kept), dtype=torch.int64),
            "visits": torch.tensor([k.visits for k in kept], dtype=torch.int64),
            "lengths": torch.tensor([len(k.scores) for k in kept], dtype=torch.int64),
            "scores": torch.cat([torch.zeros(0, dtype=torch.float16), *(k.scores for k in kept)]),
        }

    def take(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what `state` gave, in place of what is here."""
        try:
            ids, visits, lengths = (state[key].tolist() for key in ("ids", "visits", "lengths"))
            scores = state["scores"].half().cpu().split(lengths)
            rows = list(zip(ids, visits, scores, strict=True))
        except (KeyError, ValueError, RuntimeError) as error:
            raise InvalidInput(f"these are no kept scores: {error}") from error
        self._kept.clear()
        self.tokens = 0
        for example, seen, values in rows:
            self._add(example, _Kept(values.clone(), seen))

    def _add(self, example: int, kept: _Kept) -> None:
        self._kept[example] = kept
        self.tokens += len(kept.scores)
        while self.tokens > self.room:
            self._drop(next(iter(self._kept)))

    def _drop(self, example: int) -> None:
        gone = self._kept.pop(example, None)
        self.tokens -= len(gone.scores) if gone is not None else 0


def _matching(ids_B: Tensor, valid_BT: Tensor) -> Tensor:
    if ids_B.dim() != 1 or len(ids_B) != len(valid_BT) or ids_B.is_floating_point():
        raise InvalidInput(
            f"example_id of shape {tuple(ids_B.shape)} and {ids_B.dtype}: "
            f"one whole number for each of the {len(valid_BT)} rows is due"
        )
    return valid_BT.cpu()
