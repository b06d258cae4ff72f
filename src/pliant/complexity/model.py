"""Attach a scorer to a model: score prompts, score them while the model answers, export the scorer.

    scorer = attach(model, CPXConfig(), tokenizer)
    scorer.score(["What is 2 + 2?"]).score        # 1 - P(the model gets it right)
    scorer.generate(["What is 2 + 2?"])           # scored from the prefill that it needs anyway

Scoring changes nothing in what is generated: `model.generate` runs as usual. An interceptor of the
model's forward, active in this context only, waits for the forward that completes the prompt. Then
the [CPX] rows run as one more step on a copy of its cache, and the forward's output is returned
unchanged.

Shapes: B prompts, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from pliant import adapters
from pliant.anatomy.depth import cache_name, passed_cache, run_first
from pliant.anatomy.intercept import FORWARD, intercept
from pliant.complexity.config import CPXConfig
from pliant.complexity.export import ExportResult, export
from pliant.complexity.prompts import Truncation, ids_of, padding, unpadded
from pliant.complexity.scorer import PromptScorer, setting
from pliant.complexity.scores import Scores
from pliant.errors import InvalidInput
from pliant.prefill import Batch, ForwardResult, Prefilled, alike, supports_cache, supports_padding
from pliant.prefill.prefilled import Part

Leaving = float | Callable[[Scores], Any]
"""A score above which prompts leave, or a function of the scores: (n,) true where one leaves."""


def attach(
    model: nn.Module,
    config: CPXConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
) -> Complexity:
    """A new scorer on `model`; the tokenizer turns texts and messages into ids."""
    scorer = Complexity(model, config or CPXConfig())
    scorer.tokenizer = tokenizer
    return adapters.attach(model, scorer, name)


class Complexity(PromptScorer):
    """A scorer that also generates and leaves as a stock model."""

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
        with a score above `leave_above` are left to another model and not generated. It may also be
        a function of the scores that selects the prompts to leave.
        """
        self._check_enabled()
        self._check_threshold(leave_above)
        check_options(options)
        if leave_above is not None and passed_cache(options) and len(prompts) > 1:
            raise InvalidInput(
                f"leave_above, {len(prompts)} prompts and a cache: a cache holds all of a batch, "
                "and cannot follow the prompts that stay. Pass one prompt at a time, or no cache"
            )
        if isinstance(prompts, Tensor):
            batch_size = batch_size or len(prompts)  # a batch is a batch
        ids, options, truncated = self._ids(prompts, chat, truncation, options)
        lengths = [len(prompt) for prompt in ids]
        copies = returned_sequences(self.base, options)
        logits = np.zeros((len(ids), len(self.config.outputs)))
        sequences: list[Tensor | None] = [None] * (len(ids) * copies)
        answers: list[Tensor | None] = [None] * (len(ids) * copies)
        left, again, outputs = np.zeros(len(ids), dtype=bool), False, []
        # Of similar length; of equal length where the model does not support padding.
        equal = len(set(lengths)) > 1 and not supports_padding(self.anatomy)
        for rows in alike(lengths, batch_size, equal=equal):
            batch = Batch.of([ids[row] for row in rows], pad=self._pad, device=self.device)
            run = _Generation(self, batch, rows, lengths, leave_above, options)
            logits[rows], left[rows] = run.logits, run.left
            again |= run.again
            if run.output is None:
                continue
            outputs.append(run.output)
            stayed = [row for row in rows if not left[row]]
            generated = run.output if isinstance(run.output, Tensor) else run.output.sequences
            for index, sequence in enumerate(generated):
                row, copy = divmod(index, copies)
                at = stayed[row] * copies + copy
                answers[at] = answer = sequence[run.length :]
                sequences[at] = torch.cat([sequence.new_tensor(ids[stayed[row]]), answer])
        return Generated(
            self.scores(logits, truncated),
            tuple(sequences),
            self._texts(answers),
            left,
            again,
            tuple(outputs),
        )

    def export(self, folder: str | Path, tokenizer: Any = None, **options: Any) -> ExportResult:
        """Leave as a stock `*ForSequenceClassification`: see `pliant.complexity.export`."""
        return export(self, folder, tokenizer, **options)

    def _check_threshold(self, leave_above: Leaving | None) -> None:
        """Before anything runs: the threshold is a number, and there is a score to compare."""
        if leave_above is None or callable(leave_above):
            return
        if isinstance(leave_above, bool) or not isinstance(leave_above, (int, float)):
            raise InvalidInput(
                f"leave_above = {leave_above!r}: give a number (0 to 1) or a function"
            )
        _ = self.scores(np.zeros((0, len(self.config.outputs)))).score

    def _ids(
        self, prompts: Any, chat: bool, truncation: Truncation | None, options: dict[str, Any]
    ) -> tuple[list[list[int]], dict[str, Any], int]:
        """The prompts' ids, the other options, and how many prompts were truncated."""
        mask = options.pop("attention_mask", None)
        if isinstance(prompts, Tensor):
            mask = padding(prompts, *self.padding_tokens(options)) if mask is None else mask
            options = align_options(options, prompts, mask)
            rows = unpadded(prompts, mask)
        elif mask is not None:
            raise InvalidInput("attention_mask goes with a tensor of ids; lists need none")
        else:
            rows = ids_of(prompts, self.tokenizer, chat)
        fit, truncated = self.fit_prompts(rows, truncation)
        for i, prompt in enumerate(fit):
            if not prompt:
                raise InvalidInput(
                    f"prompt {i} is empty, and the model has no BOS token to begin with"
                )
        return fit, options, truncated

    @property
    def _pad(self) -> int:
        """Padding is masked, so any id of the vocabulary will do."""
        pad = getattr(self.anatomy.config, "pad_token_id", None)
        return pad if isinstance(pad, int) and pad >= 0 else 0

    def _texts(self, answers: Sequence[Tensor | None]) -> tuple[str | None, ...] | None:
        if (tokenizer := self.tokenizer) is None:
            return None
        return tuple(
            None if answer is None else tokenizer.decode(answer, skip_special_tokens=True)
            for answer in answers
        )


@dataclass(frozen=True, eq=False)
class Generated:
    """The generated sequences and the scores of the prompts, in the prompts' order."""

    scores: Scores
    sequences: tuple[Tensor | None, ...]
    """The ids of prompt and answer, `num_return_sequences` for each prompt; None where it left."""
    texts: tuple[str | None, ...] | None
    """The answers alone; None without a tokenizer."""
    left: np.ndarray
    """(n,) true for prompts that scored above the threshold and were not generated from."""
    prefilled_again: bool
    """Whether prompts were run twice: because others of their batch left, or because the model
    has no cache, or this kind of generation no prefill, to score on."""
    outputs: tuple[Any, ...]
    """The return values of `model.generate`, one for each batch."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, without `outputs`."""
        return {
            "scores": self.scores.as_dict(),
            "sequences": [None if ids is None else ids.tolist() for ids in self.sequences],
            "texts": None if self.texts is None else list(self.texts),
            "left": self.left.tolist(),
            "prefilled_again": self.prefilled_again,
        }

    def __str__(self) -> str:
        again = ", with a second prefill" if self.prefilled_again else ""
        answered = len(self.left) - int(self.left.sum())
        return f"answered {answered} of {len(self.left)} prompts{again}; {self.scores}"


class _Generation:
    """One batch through `model.generate`, whose forward is intercepted until the prompts have run:
    then they are scored."""

    def __init__(
        self,
        scorer: PromptScorer,
        batch: Batch,
        rows: Sequence[int],
        lengths: Sequence[int],
        leave_above: Leaving | None,
        options: dict[str, Any],
    ) -> None:
        self.scorer, self.batch, self.lengths = scorer, batch, lengths
        self.leave_above, self.options = leave_above, options
        self.seen, self.complete = 0, False  # positions of the prompts that were run, and if all
        self.logits = np.zeros((len(batch.ids_BT), len(scorer.config.outputs)))
        self.left = np.zeros(len(batch.ids_BT), dtype=bool)
        self.length = batch.ids_BT.shape[1]
        self.buffered: BufferedStreamer | None = None
        self.output: Any = None
        # Where a step would change the state that generation continues from, score first.
        cached = supports_cache(scorer.anatomy) and not needs_full_forward(scorer.base, options)
        self.again = not cached
        try:
            if not cached:
                self._decide(scorer.logits_at_once(batch))
            self.output = self._generate(batch, rows, scoring=cached)
        except _Left:
            stay = np.flatnonzero(~self.left).tolist()
            if stay:
                self.again = True
                batch = batch.select(stay)
                self.length = batch.ids_BT.shape[1]
                self.output = self._generate(batch, [rows[i] for i in stay], scoring=False)
            elif (streamer := options.get("streamer")) is not None:
                streamer.end()  # or its reader would wait forever

    def _generate(self, batch: Batch, rows: Sequence[int], scoring: bool) -> Any:
        model: Any = self.scorer.anatomy.model
        own = select_prompts(self.scorer.base, self.options, rows, self.lengths)
        arguments = {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT, **own}
        if not scoring:
            return model.generate(**arguments)
        if self.leave_above is not None and (streamer := own.get("streamer")) is not None:
            arguments["streamer"] = self.buffered = BufferedStreamer(streamer)
        with intercept({(model, FORWARD): self._forward}):
            output = model.generate(**arguments)
        if not self.complete:  # assisted decoding may have no forward that ends with the prompt
            self.again = True
            self._decide(self.scorer.logits_at_once(batch))
        return output

    def _forward(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.complete or args or not isinstance(ids := kwargs.get("input_ids"), Tensor):
            return original(*args, **kwargs)
        self.seen += ids.shape[1]
        if self.seen != self.batch.ids_BT.shape[1]:
            return original(**kwargs)
        self.complete = True
        layer = self.scorer.config.layer
        if layer is None:
            output = original(**kwargs)
            self._score(len(ids), getattr(output, cache_name(output) or "", None), output)
            return output
        first = run_first(self.scorer.anatomy, layer, **kwargs)
        self._score(len(ids), first.cache, first)
        return first.resume()

    def _score(self, count: int, cache: Any, output: Any) -> None:
        """`count` is the batch size times the beams or samples of each prompt, adjacent rows."""
        scorer = self.scorer
        copies = count // len(self.batch.ids_BT)
        wide = Batch(
            self.batch.ids_BT.repeat_interleave(copies, dim=0),
            self.batch.mask_BT.repeat_interleave(copies, dim=0),
        )
        name = getattr(output, "cache_name", None) or cache_name(output)
        part = Part(None, wide, ForwardResult(None, cache, name))
        ran = Prefilled(scorer.anatomy, scorer.config.layer, wide, (part,))
        self._decide(scorer.logits_of(ran)[::copies])

    def _decide(self, logits: Tensor) -> None:
        """Record the scores; if some prompts leave, this generation ends here."""
        self.logits = logits.detach().double().cpu().numpy()
        if self.leave_above is not None:
            scores = self.scorer.scores(self.logits)
            rule = self.leave_above
            leaves = rule(scores) if callable(rule) else scores.score > rule
            self.left = np.asarray(leaves, dtype=bool)
            if self.left.shape != (len(scores),):
                raise InvalidInput(
                    f"leave_above returned {leaves!r}: return true or false for each of the "
                    f"{len(scores)} prompts"
                )
            if self.left.any():
                raise _Left
        if self.buffered is not None:
            self.buffered.release()


class _Left(BaseException):
    """Some prompts leave. Not an Exception, so that no code in between handles it as an error."""


# --- the options of `generate` -------------------------------------------------------------------


def returned_sequences(model: nn.Module, options: dict[str, Any]) -> int:
    """How many sequences each prompt gets."""
    return int(setting(model, options, "num_return_sequences") or 1)


def needs_full_forward(model: nn.Module, options: dict[str, Any]) -> bool:
    """Whether generation runs without a cache, on one that holds a part of the prompts already, or
    with the first layers drafting for all."""
    if setting(model, options, "use_cache") is False or passed_cache(options) is not None:
        return True
    return setting(model, options, "assistant_early_exit") is not None


def check_options(options: dict[str, Any]) -> None:
    for name in ("input_ids", "inputs", "inputs_embeds"):
        if name in options:
            raise InvalidInput(f"{name}=: the prompts come first, as ids, texts or messages")


def align_options(
    options: dict[str, Any], ids_BT: Tensor, mask_BT: Tensor | None
) -> dict[str, Any]:
    """The options, with tensors of the prompts' shape (types, positions) aligned like them."""
    if mask_BT is None:
        return options
    order_BT = (mask_BT != 0).to(ids_BT).argsort(dim=1, stable=True)
    return {
        name: value.gather(1, order_BT.to(value.device))
        if isinstance(value, Tensor) and value.shape == ids_BT.shape
        else value
        for name, value in options.items()
    }


def select_prompts(
    model: nn.Module, options: dict[str, Any], rows: Sequence[int], lengths: Sequence[int]
) -> dict[str, Any]:
    """The options for the prompts `rows`. A tensor with an entry for each prompt is reduced to
    theirs, and a function of a prompt's index in the batch gets its index among all prompts."""
    count, width = len(lengths), max(lengths[row] for row in rows)
    selected = dict(options)
    for name, value in options.items():
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[0] == count:
            selected[name] = value[torch.as_tensor(rows, device=value.device)]
            if value.shape == (count, max(lengths)):
                selected[name] = selected[name][:, max(lengths) - width :]
    if (allowed := options.get("prefix_allowed_tokens_fn")) is not None:
        beams = int(setting(model, options, "num_beams") or 1)
        each = returned_sequences(model, options) if beams == 1 else 1

        def allowed_here(index: int, ids: Tensor) -> Any:
            row, copy = divmod(index, each)
            return allowed(rows[row] * each + copy, ids)

        selected["prefix_allowed_tokens_fn"] = allowed_here
    return selected


class BufferedStreamer(BaseStreamer):
    """Buffers streamed tokens until we know which prompts stay; the others stream nothing."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self.streamer = streamer
        self.buffer: list[Tensor] | None = []

    def put(self, value: Tensor) -> None:
        if self.buffer is None:
            self.streamer.put(value)
        else:
            self.buffer.append(value)

    def end(self) -> None:
        self.release()
        self.streamer.end()

    def release(self) -> None:
        """Stream the buffer, and from now on every token at once."""
        buffer, self.buffer = self.buffer or [], None
        for value in buffer:
            self.streamer.put(value)
