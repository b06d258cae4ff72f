"""CPXCausalLM: a base and its scorer in one module, for training loops without adapters.

    model = CPXCausalLM.from_pretrained("nano-s", cpx_token_id=id, tokenizer_size=size)
    logits, outputs = model(input_ids, attention_mask)

A facade: `model.scorer` does the work, attached to `model.base_model`, whose weights stay as they
are. Nothing is resized. The base is frozen and, in train mode, stays in eval mode: its dropout
would only blur what the scorer reads.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from pliant import loading, prefill
from pliant.complexity.config import CPXConfig
from pliant.complexity.facade.arguments import (
    check_id,
    check_known,
    check_same,
    config_of,
    prompts_in,
    tokenizer_of,
)
from pliant.complexity.model import Complexity, attach
from pliant.complexity.scores import Scores
from pliant.complexity.tokenizer import base_of, saved_scorer
from pliant.complexity.training.losses import Loss, losses
from pliant.errors import InvalidInput
from pliant.prefill import Batch


@dataclass
class CPXOutput(ModelOutput):
    """`logits, outputs = model(...)`; `loss` is there by name, and as the first by index."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    """(B, labels), the scorer's."""
    outputs: CausalLMOutputWithPast | None = None
    """The base's own, for the prompts."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.logits, self.outputs))


class CPXCausalLM(nn.Module):
    """Scores prompts that end in [CPX], and gives the base's own output for what comes before."""

    def __init__(
        self, base_model: PreTrainedModel, scorer: Complexity, cpx_token_id: int | None = None
    ) -> None:
        super().__init__()
        self.base_model = base_model
        # A part of this module, too: so its `state_dict` holds what was trained.
        self.scorer = scorer
        self.cpx_token_id = cpx_token_id
        for _, parameter in scorer.base_parameters():
            parameter.requires_grad_(False)
        self.train(base_model.training)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        cpx_token_id: int | None = None,
        num_labels: int | None = None,
        is_cpx_token_trainable: bool = True,
        tokenizer_size: int | None = None,
        config: CPXConfig | None = None,
        base: str | Path | None = None,
        insist: bool = False,
        **options: Any,
    ) -> Self:
        """A new scorer on a base, or a saved scorer (its folder or hub name) on its own base.

        `cpx_token_id` and `tokenizer_size` are those of a `CPXTokenizer` and only checked; left
        out, the base's tokenizer tells. `config` sets what `num_labels` does not. A saved scorer
        knows its base by name if it has one; else, or for a copy of it, say `base`. `options` are
        those of `pliant.load`: dtype, device, device_map, quantization_config, revision, ...
        """
        check_id(cpx_token_id, tokenizer_size)
        saved = saved_scorer(name)
        where = name if saved is None else base or base_of(saved)
        if saved is None and base is not None:
            raise InvalidInput(
                f"base={str(base)!r}: {str(name)!r} holds no scorer, so it is a base"
            )
        model = loading.load_model(where, **options)
        tokenizer = tokenizer_of(where, options)
        check_known(cpx_token_id, tokenizer)
        if saved is None:
            scorer = attach(model, config_of(config, num_labels), tokenizer)
        else:
            scorer = Complexity.from_pretrained(model, saved, tokenizer=tokenizer, insist=insist)
            check_same(scorer.config, config, num_labels, saved)
        scorer.rows.requires_grad_(is_cpx_token_trainable)
        if cpx_token_id is None and tokenizer is not None:
            cpx_token_id = tokenizer.cpx_token_id
        return cls(model, scorer, cpx_token_id)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        prefixes: Sequence[prefill.Prefix] | None = None,
        *,
        loss: Loss | None = None,
        return_outputs: bool = True,
        **inputs: Any,
    ) -> CPXOutput:
        """The scorer's logits (B, labels), and the base's output for the prompts before [CPX].

        `outputs.logits` is (B, 1, vocabulary), of each prompt's last token alone: what the first
        new token is drawn from. `outputs.past_key_values` holds the prompts, aligned to the left,
        and no [CPX]. With `return_outputs=False`, or for `prefixes` (from `Prefilled.split`, in
        place of the prompts), there is none; with an early exit that saves the other layers.
        With `labels` there is a loss: see `pliant.complexity.training.losses`.
        """
        scorer = self.scorer
        if prefixes is not None:
            joined = prefill.Prefilled.join(scorer.anatomy, prefixes, layers=scorer.config.layer)
            logits, outputs = scorer.logits_of(joined), None
        else:
            batch = self._prompts(input_ids, attention_mask)
            logits, outputs = self._run(batch, return_outputs, inputs)
        mean = None if labels is None else losses(logits, labels, loss).mean()
        return CPXOutput(loss=mean, logits=logits, outputs=outputs)

    def score(self, prompts: Sequence[Any], **options: Any) -> Scores:
        """See `Complexity.score`; `score` is 1 - P(this model succeeds)."""
        return self.scorer.score(prompts, **options)

    def generate(self, prompts: Any = None, **options: Any) -> Any:
        """See `Complexity.generate`. Ids may end in [CPX] or not; it is never generated from."""
        ids = options.pop("input_ids", prompts)
        if isinstance(ids, Tensor):
            mask = options.pop("attention_mask", None)
            batch = self._prompts(ids, mask)
            ids, options["attention_mask"] = batch.ids_BT, batch.mask_BT
        return self.scorer.generate(ids, **options)

    def save_pretrained(self, folder: str | Path, **push: Any) -> str | None:
        """Kilobytes: the scorer alone, which names its base."""
        return self.scorer.save_pretrained(folder, **push)

    def push_to_hub(self, repo_id: str, **push: Any) -> str:
        return self.scorer.push_to_hub(repo_id, **push)

    def export(self, folder: str | Path, tokenizer: Any = None, **options: Any) -> Any:
        """Leave as a stock `*ForSequenceClassification`: see `pliant.complexity.export`."""
        return self.scorer.export(folder, tokenizer, **options)

    def resize_token_embeddings(self, *args: Any, **options: Any) -> None:
        raise InvalidInput(
            "[CPX] is no row of the vocabulary: the embeddings stay as they are, whatever the "
            "tokenizer's length; leave the call out"
        )

    @property
    def classifier(self) -> nn.Linear:
        """The head, from a hidden state to the outputs."""
        return self.scorer.head

    @property
    def config(self) -> Any:
        """A copy of the base's config that knows the scorer's settings as well."""
        config = copy.deepcopy(self.base_model.config)
        config.num_labels = len(self.scorer.config.outputs)
        config.cpx_token_id = self.cpx_token_id
        config.is_cpx_token_trainable = self.scorer.rows.requires_grad
        # A Trainer that evaluates gathers what it is given, and a cache cannot be.
        config.keys_to_ignore_at_inference = ["outputs"]
        return config

    @property
    def device(self) -> torch.device:
        return self.scorer.rows.device

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.base_model.eval()
        self.scorer.train(mode)
        return self

    def _run(self, batch: Batch, wanted: bool, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        scorer, layer = self.scorer, self.scorer.config.layer
        if not all(batch.lengths) or not (wanted or inputs):  # an empty prompt has no base output
            return scorer.logits(batch.ids_BT, batch.mask_BT), None
        ran = prefill.prefill(
            scorer.anatomy,
            batch.ids_BT,
            batch.mask_BT,
            layers=layer,
            head=wanted,
            resumable=wanted,
            **_last_logits(self.base_model, inputs),
        )
        logits = scorer.logits_of(ran)
        if not wanted:
            return logits, None
        return logits, _base_output(ran if layer is None else ran.resume())

    def _prompts(self, input_ids: Tensor, attention_mask: Tensor | None) -> Batch:
        """Where the base's embeddings are: a loop that knows only a `device_map` moves nothing."""
        place = self.scorer.device
        mask = None if attention_mask is None else attention_mask.to(place)
        return prompts_in(input_ids.to(place), mask, self.cpx_token_id, self.scorer)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """The scorer is moved with the base that it is attached to, and keeps its dtype there."""
        self.base_model._apply(fn, recurse)
        return self


def _last_logits(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """So that the vocabulary is computed for the last token of each prompt alone."""
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {**({"logits_to_keep": 1} if takes else {}), **inputs}


def _base_output(ran: prefill.Prefilled) -> CausalLMOutputWithPast:
    """The base's output; without a cache where the prompts had to run one length at a time."""
    assert ran.logits is not None
    cache = ran.cache if len(ran.parts) == 1 else None
    return CausalLMOutputWithPast(logits=ran.logits.unsqueeze(1), past_key_values=cache)
