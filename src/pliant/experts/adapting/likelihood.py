"""How probable answers are under many mixtures of experts, which run as rows of one batch.

Shapes: N pairs of prompt and answer, P mixtures, T positions, A the longest answer, K experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.anatomy.decoder import last_hidden_state, run_decoder, run_head, with_hidden
from pliant.errors import InvalidInput
from pliant.experts.adapting.prompts import batches
from pliant.experts.model import use_rows
from pliant.experts.rows import Rows
from pliant.prefill import Batch
from pliant.prefill.forward import inputs_of

TOKENS = 4_096
"""At most so many in one forward, if one mixture's need not be more: larger batches leave the
processor's cache (benchmarks/expert_cem.py)."""
SLACK = 1.25
"""How much longer than the shortest of a batch a pair may be. There are many mixtures, so batches
of few pairs fill a forward too, and padding does not."""


@dataclass(frozen=True, eq=False)
class Part:
    """Pairs of similar length, which run together."""

    pairs: Tensor
    """(n,) which of the N pairs."""
    batch: Batch
    """Prompt and answer, so padded that the answers end together."""
    answer_nA: Tensor
    """Whether each of the last A tokens belongs to the answer."""

    @property
    def targets_nA(self) -> Tensor:
        return self.batch.ids_BT[:, -self.answer_nA.shape[1] :]

    def times(self, count: int) -> Batch:
        """All pairs for the first mixture, then all for the second, ..."""
        return Batch(self.batch.ids_BT.repeat(count, 1), self.batch.mask_BT.repeat(count, 1))


class Likelihood:
    """The mean log-probability of a token of each answer, for any mixtures of these experts."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        names: Sequence[str] = (),
        tokens: int = TOKENS,
        slack: float = SLACK,
    ) -> None:
        if not prompts or not all(answers):
            raise InvalidInput("there is no answer to score, or one is empty")
        self.model, self.names, self.tokens = model, tuple(names), tokens
        self.anatomy = Anatomy.of(model)
        self.count = len(prompts)
        ids = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        self.parts = [
            part for rows in _alike(ids, slack) for part in self._parts(rows, ids, answers)
        ]

    def _parts(self, chosen: list[int], ids: Any, answers: Any) -> Iterator[Part]:
        for places_of, batch in batches(self.anatomy, [ids[row] for row in chosen]):
            rows = [chosen[place] for place in places_of]
            lengths = torch.tensor([len(answers[row]) for row in rows])
            places = torch.arange(int(lengths.max()), 0, -1)
            answer_nA = (places[None] <= lengths[:, None]).to(batch.ids_BT.device)
            yield Part(torch.tensor(rows), batch, answer_nA)

    def __call__(self, weights: Tensor | None = None) -> Tensor:
        """(P, N) for (P, K) coefficients, or for (layers, P, K); without any, of what is active."""
        if weights is None:
            return self._all(None, 1)
        count = weights.shape[-2]
        longest = max(part.batch.ids_BT.numel() for part in self.parts)
        chunk = max(1, self.tokens // longest)
        chunks = [weights[..., at : at + chunk, :] for at in range(0, count, chunk)]
        return torch.cat([self._mixed(each) for each in chunks])

    def _mixed(self, weights: Tensor) -> Tensor:
        with use_rows(self.anatomy, Rows(self.names, weights)):
            return self._all(weights, weights.shape[-2])

    def _all(self, weights: Tensor | None, count: int) -> Tensor:
        wants_gradient = weights is not None and weights.requires_grad
        columns = []
        with torch.set_grad_enabled(wants_gradient):
            for part in self.parts:
                columns.append(self._run(part, count))
        order = torch.cat([part.pairs for part in self.parts]).argsort()
        return torch.cat(columns, dim=1)[:, order.to(columns[0].device)]

    def _run(self, part: Part, count: int) -> Tensor:
        """(P, n) of one part."""
        batch = part.times(count)
        inputs = {**inputs_of(self.anatomy, batch), "use_cache": False}
        longest = part.answer_nA.shape[1]
        decoded = run_decoder(self.anatomy, inputs)
        hidden = last_hidden_state(decoded)[:, -longest - 1 : -1]
        short = {**inputs, "input_ids": batch.ids_BT[:, -longest:]}
        logits = run_head(self.anatomy, with_hidden(decoded, hidden), short).logits.float()
        targets = part.targets_nA.repeat(count, 1)[..., None]
        scores = logits.log_softmax(-1).gather(-1, targets)[..., 0]
        mask = part.answer_nA.repeat(count, 1)
        mean = scores.masked_fill(~mask, 0).sum(1) / mask.sum(1)
        return mean.view(count, -1)


def _alike(ids: Sequence[Sequence[int]], slack: float) -> Iterator[list[int]]:
    """Rows of similar length."""
    rows: list[int] = []
    for row in sorted(range(len(ids)), key=lambda i: len(ids[i])):
        if rows and len(ids[row]) > slack * len(ids[rows[0]]):
            yield rows
            rows = []
        rows.append(row)
    yield rows


def answer_ids(answers: Sequence[str], tokenizer: Any, ends: bool) -> list[list[int]]:
    """Each answer's ids; with the end token, if answers to this model have one."""
    end = [tokenizer.eos_token_id] if ends and tokenizer.eos_token_id is not None else []
    return [[*tokenizer(a, add_special_tokens=False)["input_ids"], *end] for a in answers]
