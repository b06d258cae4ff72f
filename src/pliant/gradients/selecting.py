"""Which tokens of a lesson are trained: scored, counted and drawn, the same for every engine."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.anatomy.decoder import last_hidden_state, with_hidden
from pliant.errors import InvalidInput
from pliant.gradients.batch import Lesson
from pliant.gradients.choosing import words
from pliant.gradients.choosing.rules import Chosen, choose
from pliant.gradients.choosing.scores import Scored, in_chunks
from pliant.gradients.choosing.stale import StaleScores
from pliant.gradients.config import GradientConfig
from pliant.gradients.engines.sharded import is_sharded
from pliant.gradients.engines.split_forward import SplitForward
from pliant.gradients.schedule import Schedule

Reference = nn.Module | Callable[[], AbstractContextManager[Any]]
"""What "excess" compares with: another model, or what switches an adapter of this one off, such as
`peft_model.disable_adapter`."""
Router = Callable[..., Any]
"""Gives logits (B, T, V) to score from, for `input_ids` and an `attention_mask`."""


class Selector:
    """Chooses tokens; how many, its schedule says."""

    def __init__(
        self, config: GradientConfig, reference: Reference | None, router: Router | None
    ) -> None:
        if config.score == "excess" and config.needs_scores and reference is None:
            raise InvalidInput(
                'score = "excess" compares with a reference: attach(model, config, reference=...)'
            )
        self.config = self.asked = config
        self.reference, self.router = reference, router
        self.schedule = Schedule(config)
        self.losses_BT: Tensor | None = None
        """The loss at every labelled position (0 elsewhere), if the last choice made it known."""
        self.kept = StaleScores(config.refresh) if config.refresh > 1 else None
        """The scores of examples that are scored again only now and then."""
        self._confidence: Tensor | None = None
        self.draws = 0
        """How often it drew: each draw has a seed of its own, so that a resumed run draws what it
        would have drawn."""
        self._words_agree: bool | None = None
        """Whether scores can be told from some words; None until it was tried."""

    @property
    def takes_all(self) -> bool:
        """Whether every token is trained now, whatever the scores are."""
        if self.config.engine == "completion" or self.config.selection == "all":
            return True
        return self.schedule.is_dense() or (self.schedule.ratio() == 1 and not self.config.dynamic)

    @property
    def is_fair(self) -> bool:
        """Whether what is drawn, as it is weighed, stands for all tokens on average."""
        return self.config.selection in ("sampled", "uniform")

    def chosen(
        self, split: SplitForward, lesson: Lesson, decoded: Any, hidden_BTD: Tensor | None
    ) -> Chosen:
        """The positions to train, told from these hidden states."""
        self.losses_BT = None
        if self.takes_all:
            return everything(lesson.valid_BT)
        self.draws += 1
        ratio, scores_BT, generator = self.schedule.ratio(), None, self._generator()
        if self.config.needs_scores:
            assert hidden_BTD is not None
            scores_BT = self._remembered(split, lesson, decoded, hidden_BTD, generator)
            if self.config.dynamic and self._confidence is not None:
                ratio = self.schedule.ratio(float(self._confidence))
        return choose(scores_BT, lesson.valid_BT, self.config, ratio, generator)

    def _remembered(
        self,
        split: SplitForward,
        lesson: Lesson,
        decoded: Any,
        hidden_BTD: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """The scores of the last visit where these still stand, and new ones elsewhere."""
        if self.kept is None or lesson.example_id is None:
            return self._scores(split, lesson, decoded, hidden_BTD, generator)
        known = self.kept.recall(lesson.example_id, lesson.valid_BT)
        # Where a reference is these sharded weights, other processes may be running them now.
        alone = self.config.score != "excess" or not is_sharded(split.anatomy)
        if alone and not bool(known.due_B.any()):
            return known.difficulty_BT
        fresh_BT = self._scores(split, lesson, decoded, hidden_BTD, generator)
        self.kept.keep(lesson.example_id, fresh_BT, lesson.valid_BT, known.due_B)
        return torch.where(known.due_B[:, None], fresh_BT, known.difficulty_BT)

    def _scores(
        self,
        split: SplitForward,
        lesson: Lesson,
        decoded: Any,
        hidden_BTD: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """(B, T), 0 where nothing is predicted."""
        valid_BT, score = lesson.valid_BT, self.config.score
        targets_N = lesson.targets_BT[valid_BT]
        if self.router is None:
            rows, logits_of = _head_on(split, lesson, decoded, hidden_BTD.detach())
            found = self._estimated(split, lesson, decoded, rows, generator)
        else:
            rows, logits_of = _routed(self.router, lesson)
            found = None
        if found is None:
            found = in_chunks(logits_of, rows, targets_N, score, confidence=self.config.dynamic)
            if self.router is None and self.config.exit_layer is None:
                self.losses_BT = spread(found.losses_N, valid_BT)
        self._confidence = found.confidence
        scores_N = found.scores_N
        if score == "excess":
            scores_N = (scores_N - self._reference_losses(split, lesson)).clamp(min=0)
        return spread(scores_N, valid_BT)

    def _estimated(
        self,
        split: SplitForward,
        lesson: Lesson,
        decoded: Any,
        rows_ND: Tensor,
        generator: torch.Generator,
    ) -> Scored | None:
        """From some words, where this configuration and this model's way to logits allow it."""
        head, targets_N = split.anatomy.head, lesson.targets_BT[lesson.valid_BT]
        some = words.how_many(head, self.config)
        if some is None or self._words_agree is False or not len(targets_N):
            return None
        assert isinstance(head, nn.Linear)
        read = words.drawn(targets_N, head.out_features, some, generator)

        def logits_by(rows: Tensor, instead: words.PartialHead | None = None) -> Tensor:
            return split.logits(decoded, rows, lesson.inputs, instead)

        if self._words_agree is None:
            few = slice(0, words.TRIED)
            self._words_agree = words.agree(logits_by, head, read, rows_ND[few], targets_N[few])
            if not self._words_agree:
                return None
        return words.estimated(logits_by, head, read, rows_ND, targets_N, self.config.score)

    @torch.no_grad()
    def _reference_losses(self, split: SplitForward, lesson: Lesson) -> Tensor:
        without: AbstractContextManager[Any] = nullcontext()
        if isinstance(self.reference, nn.Module):
            anatomy = Anatomy.of(self.reference)
            split = SplitForward(anatomy, anatomy.model.forward)
        elif self.reference is not None:
            without = self.reference()
        with without:
            decoded = split.backbone(lesson.inputs)
            rows, logits_of = _head_on(split, lesson, decoded, last_hidden_state(decoded))
            targets_N = lesson.targets_BT[lesson.valid_BT]
            return in_chunks(logits_of, rows, targets_N, "loss").scores_N

    def switch(self, config: GradientConfig) -> None:
        """Choose by another configuration from now on, at the same place of the schedule."""
        other = Selector(config, self.reference, self.router)  # refuses what cannot be
        other.schedule.take(self.schedule.state())
        self.config, self.schedule, self.kept = config, other.schedule, other.kept

    def state(self) -> dict[str, Any]:
        """What `take` goes on from, for JSON."""
        state: dict[str, Any] = {"schedule": self.schedule.state(), "draws": self.draws}
        if self._words_agree is not None:  # to try it again would draw, and might find otherwise
            state["words_agree"] = self._words_agree
        if self._confidence is not None:  # where kept scores stand, the next step goes by it
            state["confidence"] = float(self._confidence)
        if self.config != self.asked:
            state["switched_to"] = asdict(self.config)
        if self.kept is not None:
            packed = safetensors.torch.save(self.kept.state())
            state["kept"] = base64.b64encode(packed).decode("ascii")
        return state

    def take(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved selector was."""
        if "switched_to" in state or self.config != self.asked:
            to = state.get("switched_to")
            self.switch(self.asked if to is None else GradientConfig(**to))
        self.schedule.take(state["schedule"])
        self.draws = int(state["draws"])
        self._words_agree = state.get("words_agree")
        confidence = state.get("confidence")
        self._confidence = None if confidence is None else torch.tensor(confidence)
        if self.kept is not None and "kept" in state:
            self.kept.take(safetensors.torch.load(base64.b64decode(state["kept"])))

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


LogitsOf = Callable[[Tensor], Tensor]


def _head_on(
    split: SplitForward, lesson: Lesson, decoded: Any, hidden_BTD: Tensor
) -> tuple[Tensor, LogitsOf]:
    """The labelled positions' hidden states, and the model's own way from these to logits."""
    decoded = with_hidden(decoded, hidden_BTD)
    return hidden_BTD[lesson.valid_BT], lambda rows: split.logits(decoded, rows, lesson.inputs)


def _routed(router: Router, lesson: Lesson) -> tuple[Tensor, LogitsOf]:
    with torch.no_grad():
        found = router(
            lesson.inputs["input_ids"], attention_mask=lesson.inputs.get("attention_mask")
        )
    logits_BTV = found if isinstance(found, Tensor) else found[0]
    return logits_BTV[lesson.valid_BT], lambda rows: rows


_EVERY = GradientConfig(selection="all")
