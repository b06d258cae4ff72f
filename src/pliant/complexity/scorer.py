"""The scorer on its base: [CPX] rows behind a prompt, and a head that reads their hidden states.

The rows are virtual: fp32 parameters that a hook writes behind the embeddings of a placeholder id.
No token is added, no weight of the base is touched, and while no score is computed the hooks do
nothing.

Shapes: B prompts, T positions, r rows, D features, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from pliant import adapters, prefill
from pliant.adapters import Adapter, After, Wire
from pliant.adapters.hooks import is_off
from pliant.adapters.quantized import differentiable
from pliant.anatomy import Anatomy
from pliant.anatomy.modes import without_checkpointing
from pliant.complexity.config import CPXConfig, Reads
from pliant.complexity.prompts import (
    Truncation,
    check_padding,
    checked,
    ids_of,
    padding,
    unpadded,
)
from pliant.complexity.rows import (
    ActiveRows,
    Lora,
    activated,
    active_rows,
    pooled,
    rows_like_embeddings,
    targets,
    width_read,
)
from pliant.complexity.scores import Scores
from pliant.errors import AdapterError, InvalidInput
from pliant.prefill import Batch, Prefilled, alike, device_of

PLACEHOLDER = 0
"""Any id of the vocabulary: its embedding is looked up, and the row written over it."""


class PromptScorer(Adapter):
    """Scores prompts; trained beside a frozen model, and saved without it.

    `Complexity` adds generation and export.
    """

    part = "complexity"
    config_class = CPXConfig
    config: CPXConfig

    def __init__(self, model: nn.Module, config: CPXConfig) -> None:
        super().__init__(model, config)
        anatomy = Anatomy.of(model)
        _check_layer(anatomy, config.layer)
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.rows = nn.Parameter(rows_like_embeddings(anatomy, config.rows))
        width, place = width_read(anatomy), self.rows.device
        self.head = nn.Linear(
            width, len(config.outputs), bias=config.bias, device=place, dtype=torch.float32
        )
        # At zero every first score is one half, and training does not depend on a random start.
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
        yield from differentiable(model)
        yield After(self.anatomy.embeddings, self._write_rows)
        if self.lora:
            for key, projection in targets(self.anatomy, self.config):
                yield After(projection.module, partial(self._add_lora, key))

    def summary(self) -> str:
        config = self.config
        rows = f"{config.rows} [CPX] row" + ("s" if config.rows > 1 else "")
        layer = "the last layer" if config.layer is None else f"layer {config.layer}"
        lora = f", LoRA of rank {config.lora_rank}" if config.lora_rank else ""
        return f"{rows} read after {layer}{lora}, for {', '.join(config.outputs)}"

    def read_as(self, reads: Reads) -> None:
        """Set what the outputs are: probabilities, classes or numbers, as they are trained."""
        self.config = replace(self.config, reads=reads)

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the base and of other adapters on it, without any scorer's."""
        scorers = [a for a in adapters.attached(self.base).values() if isinstance(a, PromptScorer)]
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
        self._check_enabled()
        batch = prefill.align(input_ids, attention_mask)
        with without_checkpointing(self.base):
            if whole or not torch.is_grad_enabled() or not all(batch.lengths):
                return self.logits_at_once(batch)
            ran = self.prefilled(batch.ids_BT, batch.mask_BT)
        return self.logits_of(ran)

    def logits_of(self, ran: Prefilled) -> Tensor:
        """(B, O): the rows alone, on top of prompts that were run before."""
        self._check_enabled()
        if ran.layers != self.config.layer:
            raise InvalidInput(
                f"these prompts were run through {_layers(ran.layers)}, and this scorer reads "
                f"after {_layers(self.config.layer)}: prefill(..., layers={self.config.layer})"
            )
        with without_checkpointing(self.base):
            hidden = ran.step(self.placeholders(len(ran.input_ids)), self.activate)
        return self.read(hidden)

    def read(self, hidden: Tensor) -> Tensor:
        """(B, O): aggregation and head alone, of the rows' hidden states (B, r, D)."""
        weight = self.head.weight
        h = hidden.to(device=weight.device, dtype=weight.dtype)
        with torch.autocast(device_type=h.device.type, enabled=False):
            return F.linear(pooled(h, self.config.aggregation, self.query), weight, self.head.bias)

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
        padding is given by `attention_mask` or, without one, derived as `model.generate` does.
        (Where the padding token also ends texts, a tensor that seems to be padded is an error.)

        A text is tokenized as it is; with `chat` it is a user's message. A prompt longer than the
        model's context is an error, unless `truncation` ("left" or "right") names the end to
        remove. Without a `batch_size`, prompts of similar length share a batch.
        """
        self._check_enabled()
        if isinstance(prompts, Tensor):
            if attention_mask is None:
                check_padding(prompts, *self.padding_tokens())
                attention_mask = padding(prompts, *self.padding_tokens())
            prompts = unpadded(prompts, attention_mask)
        elif attention_mask is not None:
            raise InvalidInput("attention_mask goes with a tensor of ids; lists need none")
        ids, truncated = self.fit_prompts(ids_of(prompts, self.tokenizer, chat), truncation)
        logits = np.zeros((len(ids), len(self.config.outputs)))
        for rows in alike([len(prompt) for prompt in ids], batch_size):
            batch = Batch.of([ids[row] for row in rows], device=self.device)
            logits[rows] = self.logits_at_once(batch).double().cpu().numpy()
        return self.scores(logits, truncated)

    def logits_at_once(self, batch: Batch) -> Tensor:
        """(B, O): prompts and rows in one forward, without a cache; or in one for each group of
        prompts that can share a batch."""
        groups = prefill.groups(self.anatomy, batch)
        parts = [batch if rows is None else batch.select(rows) for rows in groups]
        logits = torch.cat([self.read(self.hidden(part)) for part in parts])
        if groups[0] is None:
            return logits
        order = torch.tensor([row for rows in groups for row in rows or ()], device=logits.device)
        return logits[order.argsort()]

    def hidden(self, batch: Batch) -> Tensor:
        """(B, r, D): the rows' hidden states, from one forward of prompts and rows."""
        return prefill.on_top(
            self.anatomy,
            batch,
            self.placeholders(len(batch.ids_BT)),
            layers=self.config.layer,
            step_context=self.activate,
        )

    def prefilled(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Prefilled:
        """The prompts alone, through the layers that the scorer reads: no gradient, no head."""
        return prefill.prefill(
            self.anatomy,
            input_ids.to(self.device),
            None if attention_mask is None else attention_mask.to(self.device),
            layers=self.config.layer,
            head=False,
            resumable=False,
        )

    def activate(
        self, start: int, stop: int, shape: tuple[int, int]
    ) -> AbstractContextManager[None]:
        """The hooks write rows `start` to `stop` inside, in a forward of this shape."""
        return activated(ActiveRows(self, start, stop, shape))

    def _write_rows(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Any:
        active = active_rows(self)
        return None if active is None else active.put(output, self.rows, module)

    def _add_lora(self, key: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Any:
        active = active_rows(self)
        if active is None:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        return active.add(output, x, self.lora[key], module)

    def placeholders(self, batch: int) -> Tensor:
        """(B, r) ids for the rows to be written over."""
        return torch.full((batch, self.config.rows), PLACEHOLDER, device=self.device)

    def padding_tokens(
        self, options: dict[str, Any] | None = None
    ) -> tuple[int | None, Sequence[int | None]]:
        """The token that pads, and those that end a text, as `generate` with these options finds
        them; without options, the tokenizer's padding token is a fallback."""
        pad, end = (
            setting(self.base, options or {}, f"{name}_token_id") for name in ("pad", "eos")
        )
        if pad is None and options is None:
            pad = getattr(self.tokenizer, "pad_token_id", None)
        return pad, end if isinstance(end, (list, tuple)) else [end]

    def fit_prompts(
        self, prompts: list[list[int]], truncation: Truncation | None
    ) -> tuple[list[list[int]], int]:
        """The prompts as the model can take them, and how many were truncated."""
        vocabulary = getattr(self.anatomy.embeddings, "num_embeddings", None)
        fitting = checked(prompts, self.max_prompt_length, truncation, vocabulary)
        pairs = zip(fitting, prompts, strict=True)
        truncated = sum(len(fit) < len(prompt) for fit, prompt in pairs)
        return self.with_beginnings(fitting), truncated

    def with_beginnings(self, prompts: list[list[int]]) -> list[list[int]]:
        """An empty prompt becomes the token that begins a text, where the model has one."""
        bos = getattr(self.anatomy.config, "bos_token_id", None)
        empty = [bos] if isinstance(bos, int) and bos >= 0 else []
        return [prompt or empty for prompt in prompts]

    def scores(self, logits: np.ndarray, truncated: int = 0) -> Scores:
        """The scores that these logits (B, O) mean for this scorer's outputs."""
        return Scores(self.config.outputs, logits, truncated, self.config.reads)

    @property
    def max_prompt_length(self) -> int | None:
        """In tokens, beside the rows; None where neither model nor tokenizer has a limit."""
        limits = [getattr(self.anatomy.config, "max_position_embeddings", None)]
        limits.append(getattr(self.tokenizer, "model_max_length", None))
        numbers = [n for n in limits if isinstance(n, int) and 0 < n < 10**9]
        return min(numbers) - self.config.rows if numbers else None

    @property
    def device(self) -> torch.device:
        return device_of(self.anatomy.embeddings)

    def _check_enabled(self) -> None:
        if is_off(self):
            raise AdapterError(f"the scorer {self.name!r} is disabled in this thread")


def _check_layer(anatomy: Anatomy, layer: int | None) -> None:
    depth = len(anatomy.layers)
    if layer is not None and layer > depth:
        raise InvalidInput(f"layer = {layer}: the model has {depth} layers, so give 1 to {depth}")


def _layers(count: int | None) -> str:
    return "all layers" if count is None else f"{count} layers"


def setting(model: nn.Module, options: dict[str, Any], name: str) -> Any:
    """What `generate` uses: the value of the options, their configuration or the model's own."""
    own = getattr(model, "generation_config", None)
    values = [
        options.get(name),
        *(getattr(c, name, None) for c in (options.get("generation_config"), own)),
    ]
    return next((value for value in values if value is not None), None)
