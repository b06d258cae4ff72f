"""The model classifies the question itself: by the probability of labels, without generating.

    strategy = ByPrompt(model, tokenizer, {"math": "arithmetic", "law": "legal questions"})
    strategy.choose(["What is 17 + 4?"])

The base reads the question and the beginning of a sentence about it, whose end is one of the
labels. The most probable label is the expert's, or that of none of them: then the base answers.
Some labels are likely whatever the question is, so each is compared with its probability after a
question without content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pliant.anatomy import Anatomy
from pliant.anatomy.decoder import last_hidden_state, run_decoder, run_head, with_hidden
from pliant.data import has_chat_template
from pliant.errors import InvalidInput, did_you_mean, named_settings
from pliant.experts.adapting.likelihood import Likelihood
from pliant.experts.adapting.prompts import (
    Prompt,
    batches,
    encode,
    first_expert_layer,
    generate_batch,
    without_experts,
)
from pliant.experts.adapting.shared_prefill import SharedPrefill, can_continue
from pliant.experts.adapting.strategy import Answer, Choice, Strategy
from pliant.experts.model import use_rows
from pliant.experts.rows import Rows
from pliant.prefill.forward import inputs_of
from pliant.stats import Floats

CONTENT_FREE = ("N/A", "...", "?")
"""Questions without content, whose mean is each label's prior."""
NONE = "base"
SHARE_FROM = 64
"""Tokens in a batch from which its first layers are shared. That takes two more forwards, which
pays from about here on SmolLM2-135M, and later on smaller models (docs/experts-adapting.md)."""


@named_settings
@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What the model is asked about a question."""

    instruction: str | None = None
    """Written before the question; `{labels}` in it becomes the list of labels. None adds none,
    and the prompt is as short as can be."""
    sentence: str = "The topic of this question is"
    """Written after the question, as the beginning of the model's answer; a label follows."""
    none: str = "something else"
    """The label of the base."""
    calibrate: bool = True
    """Divide each label's probability by that after a question without content."""
    # benchmarks/expert_labels.py: .80 of questions with an expert are classified right, .42 without
    threshold: float = 0.0
    """An expert that is less probable leaves the question to the base."""
    expert: str | None = None
    """An expert trained for classifying; None lets the base classify."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise InvalidInput(f"threshold = {self.threshold}: give a probability in [0, 1]")
        if not self.sentence.strip() or not self.none.strip():
            raise InvalidInput("sentence and none need a text each")


class ByPrompt(Strategy):
    """Each prompt goes to the expert whose label the model finds most probable."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        labels: Mapping[str, str] | None = None,
        config: PromptConfig = PromptConfig(),
    ) -> None:
        """`labels` describes each expert that can be chosen; None uses their names."""
        super().__init__(model, tokenizer)
        own = {name: name for name in self.experts} if labels is None else dict(labels)
        own.pop(config.expert or "", None)
        for name in (*own, *([config.expert] if config.expert else [])):
            if name not in self.experts:
                raise InvalidInput(f"no expert {name!r}{did_you_mean(name, self.experts)}")
        self.labels = {**own, NONE: config.none}
        if len(set(self.labels.values())) < len(self.labels) or len(self.labels) < 2:
            raise InvalidInput(f"the labels {list(self.labels.values())} must differ, and be some")
        self.config, self.anatomy = config, Anatomy.of(model)
        self.suffix, self.label_ids = _continuations(
            tokenizer, config.sentence, list(self.labels.values())
        )
        self._prior: Floats | None = None

    @property
    def reads_one_token(self) -> bool:
        """Whether the labels differ in their first token, so that one forward shows them all."""
        return len({ids[0] for ids in self.label_ids}) == len(self.label_ids)

    def choose(self, prompts: Sequence[Prompt]) -> list[Choice]:
        return self._choices(self.log_probabilities(prompts)) if len(prompts) else []

    def _choices(self, scores: Floats) -> list[Choice]:
        """Of the labels' log-probabilities (prompts, labels)."""
        if self.config.calibrate:
            scores = scores - self.prior
        shifted = np.exp(scores - scores.max(1, keepdims=True))
        return [self._choice(p) for p in shifted / shifted.sum(1, keepdims=True)]

    def _choice(self, p: Floats) -> Choice:
        names = list(self.labels)
        top = int(p.argmax())
        scores = dict(zip(names, map(float, p), strict=True))
        label = self.labels[names[top]]
        if names[top] == NONE:
            return Choice({}, f"the model finds {label!r} most probable ({p[top]:.2f})", scores)
        if p[top] < self.config.threshold:
            limit = self.config.threshold
            reason = f"no expert is probable enough ({names[top]} {p[top]:.2f}, below {limit:.2f})"
            return Choice({}, reason, scores)
        reason = f"the model finds {label!r} most probable ({p[top]:.2f})"
        return Choice({names[top]: 1.0}, reason, scores)

    # --- answering -------------------------------------------------------------------------------

    @property
    def shares_prefill(self) -> bool:
        """Whether the labels are read on the answer's own prefill: the experts leave the first
        layers alone, and there is no instruction before the question."""
        return self.config.instruction is None and first_expert_layer(self.model) > 0

    def answer(
        self, prompts: Sequence[Prompt], *, batch_size: int | None = None, **generation: Any
    ) -> list[Answer]:
        """The answer to each prompt by its expert; the question's first layers run once for the
        choice and the answer, if that is possible."""
        answers: dict[int, Answer] = {}
        shares = self.shares_prefill and can_continue(self.model, generation)
        if not shares:
            return super().answer(prompts, batch_size=batch_size, **generation)
        layers = first_expert_layer(self.model)
        for rows, batch in batches(self.anatomy, encode(prompts, self.tokenizer), batch_size):
            long = batch.ids_BT.numel() >= SHARE_FROM
            shared = SharedPrefill.of(self.anatomy, batch, layers) if long else None
            if shared is None:
                own = super().answer([prompts[row] for row in rows], **generation)
            else:
                choices, texts = self._answered(shared, generation)
                own = list(map(Answer, texts, choices))
            answers.update(zip(rows, own, strict=True))
        return [answers[row] for row in range(len(prompts))]

    def _answered(
        self, shared: SharedPrefill, generation: Mapping[str, Any]
    ) -> tuple[list[Choice], list[str]]:
        """The choices for one batch, and the answers."""
        with self._active():
            scores = self._on_prefill(shared)
        choices = self._choices(scores.double().cpu().numpy())
        rows = Rows.of_mixtures([choice.mixture for choice in choices], self.experts)
        with use_rows(self.anatomy, rows):
            own = {"past_key_values": shared.cache(), **generation}
            return choices, generate_batch(self.model, self.tokenizer, shared.batch, **own)

    def _on_prefill(self, shared: SharedPrefill) -> Tensor:
        """(questions, labels), as `log_probabilities` has them."""
        if self.reads_one_token:
            first = [label[0] for label in self.label_ids]
            return shared.logits([self.suffix], 1)[:, -1].log_softmax(-1)[:, first]
        longest = max(map(len, self.label_ids))
        padded = [[*label, *[label[-1]] * (longest - len(label))] for label in self.label_ids]
        # The last of them predicts nothing.
        logits = shared.logits([[*self.suffix, *label[:-1]] for label in padded], longest)
        targets = torch.tensor(padded, device=logits.device).repeat(len(shared.batch.ids_BT), 1)
        scores = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        lengths = torch.tensor([len(label) for label in self.label_ids], device=logits.device)
        mask = torch.arange(longest, device=logits.device) < lengths[:, None]
        scores = scores.view(-1, *mask.shape)
        return (scores * mask).sum(-1) / lengths

    # --- scores ----------------------------------------------------------------------------------

    @property
    def prior(self) -> Floats:
        """(labels,) the mean log-probability of each label after questions without content."""
        if self._prior is None:
            self._prior = self.log_probabilities(CONTENT_FREE).mean(0)
        return self._prior

    def log_probabilities(self, prompts: Sequence[Prompt]) -> Floats:
        """(prompts, labels): of each label's first token, or the mean of all its tokens."""
        ids = [[*each, *self.suffix] for each in encode(self._asked(prompts), self.tokenizer)]
        with torch.no_grad(), self._active():
            scores = self._first_tokens(ids) if self.reads_one_token else self._whole_labels(ids)
        array: Floats = scores.double().cpu().numpy()
        return array

    def _active(self) -> AbstractContextManager[None]:
        if self.config.expert is None:
            return without_experts(self.anatomy)
        return use_rows(self.anatomy, Rows((self.config.expert,), torch.ones(1, 1)))

    def _asked(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts with the instruction before the last message, or the text."""
        if isinstance(prompts, str | Mapping):
            raise InvalidInput("prompts is one prompt; give a list: [prompt]")
        if self.config.instruction is None:
            return list(prompts)
        names = "\n".join(f"- {label}" for label in self.labels.values())
        before = self.config.instruction.replace("{labels}", names)
        asked: list[Prompt] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                asked.append(f"{before}\n\n{prompt}")
            else:
                *others, last = prompt
                asked.append([*others, {**last, "content": f"{before}\n\n{last['content']}"}])
        return asked

    def _first_tokens(self, ids: list[list[int]]) -> Tensor:
        """One forward for all labels."""
        first = [label[0] for label in self.label_ids]
        scores = torch.zeros(len(ids), len(first))
        for rows, batch in batches(self.anatomy, ids):
            inputs = {**inputs_of(self.anatomy, batch), "use_cache": False}
            decoded = run_decoder(self.anatomy, inputs)
            last = with_hidden(decoded, last_hidden_state(decoded)[:, -1:])
            short = {**inputs, "input_ids": batch.ids_BT[:, -1:]}
            logits = run_head(self.anatomy, last, short).logits[:, -1].float()
            scores[rows] = logits.log_softmax(-1)[:, first].cpu()
        return scores

    def _whole_labels(self, ids: list[list[int]]) -> Tensor:
        """A row for each prompt and label."""
        prompts = [each for each in ids for _ in self.label_ids]
        answers = [label for _ in ids for label in self.label_ids]
        scores = Likelihood(self.model, prompts, answers)()
        return scores.view(len(ids), len(self.label_ids))


def _continuations(
    tokenizer: Any, sentence: str, labels: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """The ids that the sentence begins with whatever the label, and what follows for each.

    A full stop ends each label, so that no label begins another.
    """
    gap = "" if has_chat_template(tokenizer) else "\n"
    texts = [f"{gap}{sentence} {label}." for label in labels]
    whole = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    shared = 0
    while all(len(ids) > shared + 1 and ids[shared] == whole[0][shared] for ids in whole):
        shared += 1
    return whole[0][:shared], [ids[shared:] for ids in whole]
