"""A scorer: [CPX] rows behind a prompt, and a head that reads what the model makes of them.

    scorer = attach(model, CPXConfig(), tokenizer)
    scorer.score(["What is 2 + 2?"]).score        # 1 - P(the model gets it right)
    scorer.generate(["What is 2 + 2?"])           # scored from the prefill that it needs anyway

The rows are virtual: fp32 parameters that a hook writes behind the embeddings of a placeholder id.
No token is added, no weight of the base is touched, and while nobody asks the hooks do nothing.

Shapes: B prompts, T positions, r rows, D features, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pliant import adapters, prefill
from pliant.adapters import Adapter, After, Wire
from pliant.adapters.hooks import is_off
from pliant.adapters.quantized import differentiable
from pliant.anatomy import Anatomy
from pliant.anatomy.modes import without_checkpointing
from pliant.complexity.config import CPXConfig, Reads
from pliant.complexity.options import setting
from pliant.complexity.prompts import (
    Truncation,
    alike,
    check_padding,
    checked,
    ids_of,
    padding,
    unpadded,
)
from pliant.complexity.rows.asking import Question, asked, asking
from pliant.complexity.rows.lora import Lora, targets
from pliant.complexity.rows.reading import read
from pliant.complexity.rows.start import rows_like_embeddings, width_read
from pliant.complexity.scores import Scores
from pliant.errors import AdapterError, InvalidInput
from pliant.prefill import Batch, Prefilled, device_of

if TYPE_CHECKING:
    from pliant.complexity.export import ExportResult
    from pliant.complexity.generation import Generated, Leaving

PLACEHOLDER = 0
"""Any id of the vocabulary: its embedding is looked up, and the row written over it."""


def attach(
    model: nn.Module,
    config: CPXConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
) -> Complexity:
    """A new scorer on `model`; the tokenizer is what texts and messages are read with."""
    scorer = Complexity(model, config or CPXConfig())
    scorer.tokenizer = tokenizer
    return adapters.attach(model, scorer, name)


class Complexity(Adapter):
    """Scores prompts; trained beside a frozen model, and saved without it."""

    part = "complexity"
    config_class = CPXConfig
    config: CPXConfig

    def __init__(self, model: nn.Module, config: CPXConfig) -> None:
        super().__init__(model, config)
        self._made_of = _MadeOf(Anatomy.of(model))
        anatomy = self._made_of.anatomy
        assert anatomy is not None
        _check_layer(anatomy, config.layer)
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.rows = nn.Parameter(rows_like_embeddings(anatomy, config.rows))
        width, place = width_read(anatomy), self.rows.device
        self.head = nn.Linear(
            width, len(config.outputs), bias=config.bias, device=place, dtype=torch.float32
        )
        # At zero: every first score is one half, and what is learned owes nothing to chance.
        nn.init.zeros_(self.head.weight)
        if config.bias:
            nn.init.zeros_(self.head.bias)
        self.query: nn.Parameter | None = None
        if config.aggregation == "attention":  # at zero it is the mean
            self.query = nn.Parameter(torch.zeros(width, device=place, dtype=torch.float32))
        self.lora = nn.ModuleDict()
        if config.lora_rank:
            for seed, (key, projection) in enumerate(targets(anatomy, config)):
                self.lora[key] = Lora(projection, config.lora_rank, config.scale, seed)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: nn.Module,
        source: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> Self:
        """Attach a saved scorer to its base; `options` are those of every adapter."""
        scorer = super().from_pretrained(model, source, **options)
        scorer.tokenizer = tokenizer
        return scorer

    def wire(self, model: nn.Module) -> Iterator[Wire]:
        anatomy = self._anatomy_of(model)
        yield from differentiable(model)
        yield After(anatomy.embeddings, self._write_rows)
        if self.lora:
            for key, projection in targets(anatomy, self.config):
                yield After(projection.module, partial(self._add_lora, key))

    def read_as(self, reads: Reads) -> None:
        """What the outputs are from now on: what they are learned as."""
        self.config = replace(self.config, reads=reads)

    @property
    def anatomy(self) -> Anatomy:
        """What the base is made of."""
        return self._anatomy_of(self.base)

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Of the base and of what else is attached to it; of no scorer, which acts on no other."""
        scorers = [a for a in adapters.attached(self.base).values() if isinstance(a, Complexity)]
        own = {id(p) for scorer in scorers for p in scorer.parameters()}
        return ((name, p) for name, p in self.base.named_parameters() if id(p) not in own)

    def logits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, whole: bool = False
    ) -> Tensor:
        """(B, O) in fp32, differentiable with respect to what is trained.

        Padding may be on either side. With gradients, only the rows run with them, on top of a
        prefill without. Under `torch.no_grad()`, or `whole` (for a base that is trained as well),
        prompt and rows run as one.
        """
        self._check_asked()
        batch = prefill.align(input_ids, attention_mask)
        with without_checkpointing(self.base):
            if whole or not torch.is_grad_enabled() or not all(batch.lengths):
                return self._logits_at_once(batch)
            ran = prefill.prefill(
                self.anatomy,
                batch.ids_BT,
                batch.mask_BT,
                layers=self.config.layer,
                head=False,
                resumable=False,
            )
        return self.logits_of(ran)

    def logits_of(self, ran: Prefilled) -> Tensor:
        """(B, O): the rows alone, on top of prompts that were run before."""
        self._check_asked()
        if ran.layers != self.config.layer:
            raise InvalidInput(
                f"these prompts were run through {_layers(ran.layers)}, and this scorer reads "
                f"after {_layers(self.config.layer)}: prefill(..., layers={self.config.layer})"
            )
        with without_checkpointing(self.base):
            hidden = ran.step(self._placeholders(len(ran.input_ids)), self._entering)
        return self.read(hidden)

    def read(self, hidden: Tensor) -> Tensor:
        """(B, O): aggregation and head alone, of the rows' hidden states (B, r, D)."""
        return read(hidden, self.head, self.config.aggregation, self.query)

    @torch.inference_mode()
    def score(
        self,
        prompts: Sequence[Any] | Tensor,
        *,
        attention_mask: Tensor | None = None,
        batch_size: int | None = None,
        chat: bool = False,
        truncation: Truncation | None = None,
    ) -> Scores:
        """Score texts, lists of messages or lists of ids, in their order; or a tensor of ids, whose
        padding is what `attention_mask` says or, without one, what `model.generate` takes for it
        (that the token may also end texts, and so be none, is an error).

        A text is tokenized as it is; with `chat` it is what a user said, as messages are. A prompt
        longer than the model's context is an error, unless `truncation` ("left" or "right") says
        which end to take off. Without a `batch_size` prompts of like length share a batch.
        """
        self._check_asked()
        if isinstance(prompts, Tensor):
            if attention_mask is None:
                check_padding(prompts, *self._padding())
                attention_mask = padding(prompts, *self._padding())
            prompts = unpadded(prompts, attention_mask)
        elif attention_mask is not None:
            raise InvalidInput("attention_mask goes with a tensor of ids; lists need none")
        ids, truncated = self._fit(ids_of(prompts, self.tokenizer, chat), truncation)
        logits = np.zeros((len(ids), len(self.config.outputs)))
        for rows in alike([len(prompt) for prompt in ids], batch_size):
            batch = Batch.of([ids[row] for row in rows], device=self._place)
            logits[rows] = self._logits_at_once(batch).double().cpu().numpy()
        return Scores(self.config.outputs, logits, truncated, self.config.reads)

    def generate(
        self,
        prompts: Any,
        *,
        leave_above: Leaving | None = None,
        batch_size: int | None = None,
        chat: bool = False,
        truncation: Truncation | None = None,
        **options: Any,
    ) -> Generated:
        """Generate as `model.generate(**options)` does, and score from the same prefill.

        Prompts as for `score`, or a tensor of ids with `attention_mask` among the options. Those
        with a score above `leave_above` are not generated: another model shall answer them. It may
        also be a function of the scores that says which prompts leave.
        """
        from pliant.complexity.generation import generate

        self._check_asked()
        settings = {"batch_size": batch_size, "chat": chat, "truncation": truncation}
        return generate(self, prompts, leave_above, settings, options)

    def export(self, folder: str | Path, tokenizer: Any = None, **options: Any) -> ExportResult:
        """Leave as a stock `*ForSequenceClassification`: see `pliant.complexity.export`."""
        from pliant.complexity.export import export

        return export(self, folder, tokenizer, **options)

    def _logits_at_once(self, batch: Batch) -> Tensor:
        """Prompts and rows in one forward, without a cache; or one for each group of prompts."""
        groups = prefill.groups(self.anatomy, batch)
        parts = [batch if rows is None else batch.take(rows) for rows in groups]
        logits = torch.cat([self._logits_in_one_forward(part) for part in parts])
        if groups[0] is None:
            return logits
        order = torch.tensor([row for rows in groups for row in rows or ()], device=logits.device)
        return logits[order.argsort()]

    def _logits_in_one_forward(self, batch: Batch) -> Tensor:
        hidden = prefill.on_top(
            self.anatomy,
            batch,
            self._placeholders(len(batch.ids_BT), batch.ids_BT.device),
            layers=self.config.layer,
            entering=self._entering,
        )
        return self.read(hidden)

    def _entering(
        self, start: int, stop: int, shape: tuple[int, int]
    ) -> AbstractContextManager[None]:
        return asking(Question(self, start, stop, shape))

    def _write_rows(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Any:
        question = asked(self)
        return None if question is None else question.put(output, self.rows, module)

    def _add_lora(self, key: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Any:
        question = asked(self)
        if question is None:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        return question.add(output, x, self.lora[key], module)

    def _placeholders(self, batch: int, device: torch.device | None = None) -> Tensor:
        place = self._place if device is None else device
        return torch.full((batch, self.config.rows), PLACEHOLDER, device=place)

    def _padding(
        self, options: dict[str, Any] | None = None
    ) -> tuple[int | None, Sequence[int | None]]:
        """The token that pads, and those that end a text: as `generate` finds them, which is told
        `options`; without any, the tokenizer may say as well."""
        pad, end = (setting(self, options or {}, f"{name}_token_id") for name in ("pad", "eos"))
        if pad is None and options is None:
            pad = getattr(self.tokenizer, "pad_token_id", None)
        return pad, end if isinstance(end, (list, tuple)) else [end]

    def _fit(
        self, prompts: list[list[int]], truncation: Truncation | None
    ) -> tuple[list[list[int]], int]:
        """The prompts as the model can take them, and how many were cut. One of no token at all
        begins as any text does, where the model knows how."""
        known = getattr(self.anatomy.embeddings, "num_embeddings", None)
        bos = getattr(self.anatomy.config, "bos_token_id", None)
        begun = [bos] if isinstance(bos, int) and bos >= 0 else []
        fit = checked(prompts, self._room, truncation, known)
        cut = sum(len(one) < len(other) for one, other in zip(fit, prompts, strict=True))
        return [prompt or begun for prompt in fit], cut

    @property
    def _room(self) -> int | None:
        """How many tokens a prompt may have; None where the model does not say."""
        limits = [getattr(self.anatomy.config, "max_position_embeddings", None)]
        limits.append(getattr(self.tokenizer, "model_max_length", None))
        known = [n for n in limits if isinstance(n, int) and 0 < n < 10**9]
        return min(known) - self.config.rows if known else None

    @property
    def _place(self) -> torch.device:
        return device_of(self.anatomy.embeddings)

    def _anatomy_of(self, model: nn.Module) -> Anatomy:
        found = self._made_of
        if found.anatomy is None or found.model is not model:
            self._made_of = found = _MadeOf(Anatomy.of(model), model)
        assert found.anatomy is not None
        return found.anatomy

    def detach(self) -> None:
        super().detach()
        self._made_of = _MadeOf()

    def _check_asked(self) -> None:
        if is_off(self):
            raise AdapterError(f"the scorer {self.name!r} is disabled in this thread")


class _MadeOf:
    """The anatomy of the base, found once; no copy of a scorer takes the base with it."""

    def __init__(self, anatomy: Anatomy | None = None, model: nn.Module | None = None) -> None:
        self.anatomy = anatomy
        self.model = model

    def __deepcopy__(self, memo: Any) -> _MadeOf:
        return _MadeOf()


def _check_layer(anatomy: Anatomy, layer: int | None) -> None:
    depth = len(anatomy.layers)
    if layer is not None and layer > depth:
        raise InvalidInput(f"layer = {layer}: the model has {depth} layers, so give 1 to {depth}")


def _layers(count: int | None) -> str:
    return "all layers" if count is None else f"{count} layers"
