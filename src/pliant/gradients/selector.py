"""Which tokens of a batch are trained, and how many at which step; the same for every engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from pliant.adapters.saving import without_retired
from pliant.errors import InvalidInput
from pliant.gradients.config import GradientConfig
from pliant.gradients.engines.split_forward import SplitForward
from pliant.gradients.labelled_batch import LabelledBatch
from pliant.gradients.selection.rules import Chosen, choose
from pliant.gradients.selection.scores import Scored, in_chunks
from pliant.gradients.selection.vocabulary_sample import (
    TRIAL_ROWS,
    LogitsBy,
    PartialHead,
    VocabularySample,
    sample_size,
)

Router = Callable[..., Any]
"""Gives logits (B, T, V) to score from, for `input_ids` and an `attention_mask`."""


class Selector:
    """Chooses tokens; its schedule decides how many."""

    def __init__(self, config: GradientConfig, router: Router | None) -> None:
        self.config = self.asked = config
        self.router = router
        self.schedule = Schedule(config)
        self.losses_BT: Tensor | None = None
        """The loss at every labelled position (0 elsewhere), if the last choice made it known."""
        self._confidence: Tensor | None = None
        self.draws = 0
        """The draws so far: each has its own seed, so that a resumed run draws the same."""
        self._sample_agrees: bool | None = None
        """Whether scores can be estimated from a vocabulary sample; None until it was tried."""

    @property
    def takes_all(self) -> bool:
        """Whether every token is trained now, whatever the scores are."""
        if self.config.engine == "completion" or self.config.selection == "all":
            return True
        return self.schedule.is_dense() or (self.schedule.ratio() == 1 and not self.config.dynamic)

    @property
    def is_fair(self) -> bool:
        """Whether the drawn tokens, as they are weighted, represent all tokens on average."""
        return self.config.selection in ("sampled", "uniform")

    def chosen(
        self, split: SplitForward, batch: LabelledBatch, decoded: Any, hidden_BTD: Tensor | None
    ) -> Chosen:
        """The positions to train, scored from these hidden states."""
        self.losses_BT = None
        if self.takes_all:
            return everything(batch.valid_BT)
        self.draws += 1
        ratio, scores_BT, generator = self.schedule.ratio(), None, self._generator()
        if self.config.needs_scores:
            assert hidden_BTD is not None
            scores_BT = self._scores(split, batch, decoded, hidden_BTD, generator)
            if self.config.dynamic and self._confidence is not None:
                ratio = self.schedule.ratio(float(self._confidence))
        return choose(scores_BT, batch.valid_BT, self.config, ratio, generator)

    def _scores(
        self,
        split: SplitForward,
        batch: LabelledBatch,
        decoded: Any,
        hidden_BTD: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """(B, T), 0 where nothing is predicted."""
        valid_BT, targets_N = batch.valid_BT, batch.targets_BT[batch.valid_BT]

        def on_head(rows: Tensor, instead: PartialHead | None = None) -> Tensor:
            return split.logits(decoded, rows, batch.inputs, instead)

        def in_full(logits_of: Callable[[Tensor], Tensor], rows: Tensor) -> Scored:
            score, confidence = self.config.score, self.config.dynamic
            return in_chunks(logits_of, rows, targets_N, score, confidence=confidence)

        if self.router is not None:
            scored = in_full(lambda logits_NV: logits_NV, _routed(self.router, batch)[valid_BT])
        else:
            rows_ND = hidden_BTD.detach()[valid_BT]
            estimate = self._estimated(split.anatomy.head, on_head, rows_ND, targets_N, generator)
            scored = in_full(on_head, rows_ND) if estimate is None else estimate
            if estimate is None and self.config.exit_layer is None:
                self.losses_BT = spread(scored.losses_N, valid_BT)
        self._confidence = scored.confidence
        return spread(scored.scores_N, valid_BT)

    def _estimated(
        self,
        head: nn.Module | None,
        on_head: LogitsBy,
        rows_ND: Tensor,
        targets_N: Tensor,
        generator: torch.Generator,
    ) -> Scored | None:
        """From a vocabulary sample, where the configuration and the model allow it."""
        size = sample_size(head, self.config)
        if size is None or self._sample_agrees is False or not len(targets_N):
            return None
        assert isinstance(head, nn.Linear)
        sample = VocabularySample.draw(head, targets_N, size, generator)
        if self._sample_agrees is None:
            trial = slice(0, TRIAL_ROWS)
            self._sample_agrees = sample.agrees(on_head, rows_ND[trial], targets_N[trial])
            if not self._sample_agrees:
                return None
        return sample.scores(on_head, rows_ND, targets_N, self.config.score)

    def switch(self, config: GradientConfig) -> None:
        """Choose by another configuration from now on, at the same place of the schedule."""
        schedule = Schedule(config)
        schedule.load_state(self.schedule.state())
        self.config, self.schedule = config, schedule

    def state(self) -> dict[str, Any]:
        """For `load_state`, as JSON."""
        state: dict[str, Any] = {"schedule": self.schedule.state(), "draws": self.draws}
        if self._sample_agrees is not None:  # trying again would draw another sample
            state["words_agree"] = self._sample_agrees
        if self.config != self.asked:
            state["switched_to"] = asdict(self.config)
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved state."""
        if "switched_to" in state or self.config != self.asked:
            to = state.get("switched_to")
            self.switch(
                self.asked if to is None else GradientConfig(**without_retired(GradientConfig, to))
            )
        self.schedule.load_state(state["schedule"])
        self.draws = int(state["draws"])
        self._sample_agrees = state.get("words_agree")

    def _generator(self) -> torch.Generator:
        distributed = torch.distributed
        ready = distributed.is_available() and distributed.is_initialized()
        rank = distributed.get_rank() if ready else 0
        seed = (self.config.seed * 1_000_003 + self.draws) * 8191 + rank
        return torch.Generator().manual_seed(seed % 2**63)


def spread(values_N: Tensor, valid_BT: Tensor) -> Tensor:
    """The values of the valid positions where they belong, and 0 elsewhere."""
    values_BT = values_N.new_zeros(valid_BT.shape)
    values_BT[valid_BT] = values_N
    return values_BT


def everything(valid_BT: Tensor) -> Chosen:
    return choose(None, valid_BT, _EVERY, 1.0)


def _routed(router: Router, batch: LabelledBatch) -> Tensor:
    mask = batch.inputs.get("attention_mask")
    with torch.no_grad():
        output = router(batch.inputs["input_ids"], attention_mask=mask)
    return output if isinstance(output, Tensor) else output[0]


_EVERY = GradientConfig(selection="all")


# --- how many ------------------------------------------------------------------------------------


class Schedule:
    """Counts steps and gives the ratio of each.

    Once `step` is called (by a training loop or a Trainer's callback), only it counts: what came
    before the first call belonged to that first step. Until then `begin` distinguishes steps from
    the parts of an accumulated one, as far as a forward pass can know.
    """

    def __init__(self, config: GradientConfig) -> None:
        self.config = config
        self.count = torch.zeros((), dtype=torch.long)
        """Steps that are over. What somebody writes to it holds, as in a state that is loaded."""
        self._written = self._start = 0
        self._by_hand = False
        self._open = False
        self._items: Any = None
        self._version: int | None = None
        self._watching = False
        """Whether the weights were seen to change: then that is what ends a step."""

    @property
    def steps(self) -> int:
        """Steps that are over."""
        count = int(self.count)
        if count != self._written:
            self._written = self._start = count
            self._open = False
        return count

    @steps.setter
    def steps(self, count: int) -> None:
        self.count.fill_(count)
        self._written = count

    def ratio(self, confidence: float | None = None) -> float:
        """The share of tokens to train now: 1 on dense steps and at the start of the warm-up.

        With `dynamic`, a mean top probability below 1/2 raises the ratio and one above it lowers
        it, by up to `sensitivity` of it, within half of it and 1; during the warm-up by as much
        less as there is still to go. A "fixed_quota" is not moved.
        """
        if self.is_dense():
            return 1.0
        progress = self._progress()
        base = 1.0 - progress * (1.0 - self.config.ratio)
        if confidence is None or not self.config.dynamic or self.config.selection == "fixed_quota":
            return base
        pull = progress * self.config.sensitivity * (1.0 - 2.0 * confidence)
        return min(1.0, max(base / 2, base * (1.0 + pull)))

    def is_dense(self) -> bool:
        """Whether this step trains every token, whatever the ratio is."""
        every = self.config.dense_every
        return self.steps < self.config.dense_first or (every > 0 and self.steps % every == 0)

    def begin(self, items: Any = None, version: int | None = None) -> None:
        """A forward pass begins that trains: of another step than the last one's, or of the same.

        A step is over when the weights have changed (`version`, see `version_of`). Where that is
        never seen (sharded weights, DeepSpeed's, and those of fused optimizers change behind
        torch's back), a Trainer gives all parts of a step the same count of tokens, the very same
        tensor (`items`). Where there is neither, a forward pass is a step.
        """
        changed = version is not None and version != self._version
        steps = self.steps
        if self._open:
            if changed and not self._watching:  # what was seen until now was one step
                self.steps, self._watching = self._start if not self._by_hand else steps, True
                self.forward_seen()
            elif changed if self._watching else not _is_same(items, self._items):
                self.forward_seen()
        self._open, self._items, self._version = True, items, version

    def forward_seen(self) -> None:
        """A forward pass was trained that is a step, unless somebody calls `step`."""
        if not self._by_hand:
            self.steps += 1

    def step(self) -> None:
        """The optimizer has stepped."""
        steps = self.steps
        if not self._by_hand:
            steps, self._by_hand = self._start, True
        self.steps = steps + 1

    def state(self) -> dict[str, Any]:
        """For `load_state`, as JSON: the forward pass that was last begun is over."""
        ahead = self._open and not self._by_hand
        return {"steps": self.steps + ahead, "by_hand": self._by_hand}

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume from a saved state."""
        steps, by_hand = state.get("steps"), state.get("by_hand")
        if not isinstance(steps, int) or steps < 0 or not isinstance(by_hand, bool):
            raise InvalidInput(
                f'a schedule\'s state is {{"steps": 3, "by_hand": true}}: not {state!r}'
            )
        self.steps = self._start = steps
        self._by_hand = by_hand
        self._open, self._items, self._version, self._watching = False, None, None, False

    def _progress(self) -> float:
        """How much of the warm-up is over."""
        if self.config.warmup_steps == 0:
            return 1.0
        return min(1.0, max(0, self.steps - self.config.dense_first) / self.config.warmup_steps)


def version_of(model: nn.Module) -> int:
    """Another number once an optimizer has written into the weights that are trained."""
    return sum(p._version for p in model.parameters() if p.requires_grad)


def _is_same(items: Any, before: Any) -> bool:
    """Whether both are one tensor: another step's count may well be the same number."""
    if not isinstance(items, Tensor) or not isinstance(before, Tensor):
        return False
    return items is before or items.data_ptr() == before.data_ptr()
