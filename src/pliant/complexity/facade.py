"""CPXCausalLM: a base and its scorer in one module, for training loops without adapters.

    model = CPXCausalLM.from_pretrained("nano-s", cpx_token_id=id, tokenizer_size=size)
    logits, outputs = model(input_ids, attention_mask)

A facade for `model.scorer`, which is attached to `model.base_model` and does the work. No weight of
the base changes, and nothing is resized. The base is frozen and stays in eval mode, even in train
mode: its dropout would only add noise to what the scorer reads.
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
from pliant.anatomy.depth import CACHE_NAMES, collected_inside, passed_cache
from pliant.complexity.config import CPXConfig
from pliant.complexity.model import Complexity, attach
from pliant.complexity.plain_loops import WrappedBase
from pliant.complexity.prompts import checked, unpadded
from pliant.complexity.saved import base_of, saved_scorer
from pliant.complexity.scores import Scores
from pliant.complexity.tokenizer import CPXTokenizer
from pliant.complexity.training.config import CPXDatasetConfig, CPXTrainingConfig, Loss
from pliant.complexity.training.losses import losses
from pliant.errors import InvalidInput, PliantError, UnsupportedModel
from pliant.prefill import Batch

# Their names from when the wrapper served Mistral alone.
CPXMistralConfig = CPXConfig
CPXMistralDatasetConfig = CPXDatasetConfig
CPXMistralTokenizer = CPXTokenizer
MistralTrainingConfig = CPXTrainingConfig


@dataclass
class CPXOutput(ModelOutput):
    """`logits, outputs = model(...)`; `loss` is available by name, and by index as the first."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    """(B, labels), of the scorer."""
    outputs: CausalLMOutputWithPast | None = None
    """The base's output for the prompts."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.logits, self.outputs))


class CPXCausalLM(WrappedBase):
    """Scores prompts that end in [CPX], and returns the base's output for the text before it."""

    def __init__(
        self, base_model: PreTrainedModel, scorer: Complexity, cpx_token_id: int | None = None
    ) -> None:
        super().__init__()
        self.base_model = base_model
        # Registered here as well: `state_dict` has what is trained, and no frozen base.
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

        `cpx_token_id` and `tokenizer_size` are those of a `CPXTokenizer` and are only checked; by
        default the id is that of the base's tokenizer. `config` sets what `num_labels` does not. A
        saved scorer records its base's name; pass `base` if it has none, or to use a copy.
        `options` are those of `pliant.load`: dtype, device, device_map, quantization_config, ...
        """
        _check_id(cpx_token_id, tokenizer_size)
        saved = saved_scorer(name)
        where = name if saved is None else base or base_of(saved)
        if saved is None and base is not None:
            raise InvalidInput(
                f"base={str(base)!r}: {str(name)!r} holds no scorer, so it is itself the base"
            )
        model = loading.load_model(where, **options)
        tokenizer = _tokenizer_of(where, options)
        _check_known(cpx_token_id, tokenizer)
        if saved is None:
            scorer = attach(model, _config_of(config, num_labels), tokenizer)
        else:
            scorer = Complexity.from_pretrained(model, saved, tokenizer=tokenizer, insist=insist)
            _check_same(scorer.config, config, num_labels, saved)
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

        `outputs.logits` is (B, 1, vocabulary), of each prompt's last token: the distribution of the
        first new token. `outputs.past_key_values` holds the prompts, padded on the left, without
        [CPX]. `outputs` is None with `return_outputs=False` (then an early exit skips the remaining
        layers), or for `prefixes` (from `Prefilled.split`, instead of the prompts). With `labels`
        there is a loss: see `pliant.complexity.training.losses`. `outputs` has `hidden_states` and
        `attentions` if `output_hidden_states=True` and `output_attentions=True` request them.

        With a cache (`past_key_values`), this is a step of decoding: nothing is scored, `logits` is
        None, and `outputs` is the base's own output.
        """
        if passed_cache(inputs) is not None:
            return self._decode(input_ids, attention_mask, labels, inputs)
        options: dict[str, Any] = {"loss": loss, "return_outputs": return_outputs, **inputs}
        return self.prefill_forward(input_ids, attention_mask, labels, prefixes, **options)

    def prefill_forward(
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
        """`forward` of whole prompts: what it does unless there is a cache."""
        if passed_cache(inputs) is not None:
            raise InvalidInput("prefill_forward takes whole prompts: call the model with a cache")
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
        """See `Complexity.generate`. A [CPX] at the end of the ids is removed first."""
        ids = options.pop("input_ids", prompts)
        if isinstance(ids, Tensor):
            mask = options.pop("attention_mask", None)
            batch = self._prompts(ids, mask)
            ids, options["attention_mask"] = batch.ids_BT, batch.mask_BT
        return self.scorer.generate(ids, **options)

    def save_pretrained(self, folder: str | Path, **push: Any) -> str | None:
        """Save only the scorer, some kilobytes, with the name of its base."""
        return self.scorer.save_pretrained(folder, **push)

    def push_to_hub(self, repo_id: str, **push: Any) -> str:
        return self.scorer.push_to_hub(repo_id, **push)

    def export(self, folder: str | Path, tokenizer: Any = None, **options: Any) -> Any:
        """Leave as a stock `*ForSequenceClassification`: see `pliant.complexity.export`."""
        return self.scorer.export(folder, tokenizer, **options)

    def resize_token_embeddings(self, *args: Any, **options: Any) -> None:
        raise InvalidInput(
            "[CPX] is not a row of the vocabulary, so the embeddings need no resizing, whatever "
            "the tokenizer's length: remove the call"
        )

    @property
    def classifier(self) -> nn.Linear:
        """The head, from a hidden state to the outputs."""
        return self.scorer.head

    @property
    def params_to_train(self) -> list[nn.Parameter]:
        """What an optimizer gets: the head, the [CPX] rows unless frozen, and the LoRA, if any."""
        return [p for p in self.scorer.parameters() if p.requires_grad]

    @property
    def config(self) -> Any:
        """A copy of the base's config, with the scorer's settings."""
        config = copy.deepcopy(self.base_model.config)
        config.num_labels = len(self.scorer.config.outputs)
        config.cpx_token_id = self.cpx_token_id
        config.is_cpx_token_trainable = self.scorer.rows.requires_grad
        # A Trainer gathers the outputs of an evaluation, which a cache does not support.
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
        if wanted and layer is not None and collected_inside(scorer.anatomy, inputs):
            logits = scorer.logits(batch.ids_BT, batch.mask_BT)
            return logits, _base_output(self._prefill(batch, None, wanted, inputs))
        ran = self._prefill(batch, layer, wanted, inputs)
        logits = scorer.logits_of(ran)
        if not wanted:
            return logits, None
        return logits, _base_output(ran if layer is None else ran.resume())

    def _prefill(
        self, batch: Batch, layer: int | None, wanted: bool, inputs: dict[str, Any]
    ) -> prefill.Prefilled:
        return prefill.prefill(
            self.scorer.anatomy,
            batch.ids_BT,
            batch.mask_BT,
            layers=layer,
            head=wanted,
            resumable=wanted,
            **_last_logits(self.base_model, inputs),
        )

    def _decode(
        self, ids: Tensor, mask: Tensor | None, labels: Tensor | None, inputs: dict[str, Any]
    ) -> CPXOutput:
        """The base's own forward on its cache."""
        if labels is not None:
            raise InvalidInput("labels are those of whole prompts: leave them out with a cache")
        if self.cpx_token_id is not None and bool((ids == self.cpx_token_id).any()):
            raise InvalidInput(
                f"the ids hold [CPX] ({self.cpx_token_id}), and a cache was passed, which holds "
                "the beginning of the prompts: pass whole prompts to score them"
            )
        if mask is not None:
            inputs = {**inputs, "attention_mask": mask}
        takes = inspect.signature(self.base_model.forward).parameters
        own = next((name for name in CACHE_NAMES if name in takes), "past_key_values")
        if own not in inputs and "past_key_values" in inputs:  # as `outputs` calls every cache
            inputs = {own: inputs["past_key_values"], **inputs}
            del inputs["past_key_values"]
        return CPXOutput(outputs=self.base_model(input_ids=ids, **inputs))

    def _prompts(self, input_ids: Tensor, attention_mask: Tensor | None) -> Batch:
        """The prompts without their trailing [CPX]; anywhere else its id is an error."""
        rows = unpadded(input_ids, attention_mask)
        rows = [row[:-1] if row and row[-1] == self.cpx_token_id else row for row in rows]
        for i, row in enumerate(rows):
            if self.cpx_token_id in row:
                raise InvalidInput(
                    f"prompt {i} holds [CPX] ({self.cpx_token_id}) before its end: it ends a "
                    "prompt, once. If what follows is padding, pass the attention_mask"
                )
        vocabulary = getattr(self.scorer.anatomy.embeddings, "num_embeddings", None)
        rows = self.scorer.with_beginnings(checked(rows, None, None, vocabulary))
        return Batch.of(rows, device=self.scorer.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the base, and with it the scorer, which retains its dtype."""
        self.base_model._apply(fn, recurse)
        return self


def _last_logits(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, so that the head runs only on each prompt's last token."""
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {**({"logits_to_keep": 1} if takes else {}), **inputs}


def _base_output(ran: prefill.Prefilled) -> CausalLMOutputWithPast:
    """The base's output; without a cache if the prompts had to run one length at a time."""
    assert ran.logits is not None
    outputs, alone = [part.result.output for part in ran.parts], len(ran.parts) == 1
    collected = {name: getattr(outputs[0], name, None) for name in ("hidden_states", "attentions")}
    if not alone and (requested := [name for name, value in collected.items() if value]):
        raise UnsupportedModel(
            f"{type(ran.anatomy.model).__name__} does not support padding on the left, so prompts "
            f"of several lengths have no {requested[0]} in common: run one length at a time"
        )
    return CausalLMOutputWithPast(
        logits=ran.logits.unsqueeze(1), past_key_values=ran.cache if alone else None, **collected
    )


def _tokenizer_of(where: str | Path, options: dict[str, Any]) -> CPXTokenizer | None:
    """The base's tokenizer with [CPX]; None if it has none that is suitable: ids still work."""
    passed = {k: v for k, v in options.items() if k in ("revision", "trust_remote_code")}
    try:
        return CPXTokenizer.from_pretrained(where, **passed)
    except PliantError:
        return None


def _config_of(config: CPXConfig | None, num_labels: int | None) -> CPXConfig:
    if config is None:
        return CPXConfig(num_labels=num_labels)
    if num_labels not in (None, config.num_labels):
        raise InvalidInput(f"num_labels={num_labels}, and the config has {config.num_labels}")
    return config


def _check_same(
    saved: CPXConfig, config: CPXConfig | None, num_labels: int | None, folder: Path
) -> None:
    if num_labels not in (None, saved.num_labels) or config not in (None, saved):
        raise InvalidInput(
            f"{folder} holds a scorer with {saved.num_labels} outputs and settings of its own "
            "(pliant.json): leave num_labels and config out"
        )


def _check_id(cpx_token_id: Any, tokenizer_size: int | None) -> None:
    advice = "make the tokenizer with CPXTokenizer.from_pretrained, and take both from it"
    if cpx_token_id is None:
        return
    if not isinstance(cpx_token_id, int) or isinstance(cpx_token_id, bool) or cpx_token_id < 0:
        raise InvalidInput(f"cpx_token_id={cpx_token_id!r} is not a token id: {advice}")
    if tokenizer_size is not None and cpx_token_id != tokenizer_size - 1:
        raise InvalidInput(
            f"cpx_token_id={cpx_token_id} is not the last id of tokenizer_size={tokenizer_size}, "
            f"as [CPX]'s is: {advice}"
        )


def _check_known(cpx_token_id: int | None, tokenizer: CPXTokenizer | None) -> None:
    if cpx_token_id is None or tokenizer is None:
        return
    if cpx_token_id < tokenizer.cpx_token_id:
        raise InvalidInput(
            f"cpx_token_id={cpx_token_id} is {tokenizer.convert_ids_to_tokens(cpx_token_id)!r} in "
            f"the base's vocabulary; [CPX] is {tokenizer.cpx_token_id}: make the tokenizer with "
            "CPXTokenizer.from_pretrained"
        )
