"""The verifier that asks a reward model: a sequence classifier that scores a prompt's answer."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pliant.errors import InvalidInput, ModelNotFound, did_you_mean
from pliant.verify.text import as_text


@dataclass
class RewardModel:
    """Any Hugging Face sequence classifier decides, by its score of the prompt and the answer.

    A model with one output gives the sigmoid of it, or with `raw` the number itself; one with
    several gives the probability (raw: the logit) of `label`. The model is loaded when it is first
    used. Its tokenizer's chat template writes the two as a conversation; without one they are a
    pair if the tokenizer separates pairs, and else one text. The reference is not looked at.
    """

    name: ClassVar[str] = "reward_model"
    needs_reference: ClassVar[bool] = False
    seconds: ClassVar[float] = 120.0
    """How long a caller with a time limit waits for the score of one answer."""
    model: str
    """A folder, or a name on the hub."""
    label: str | None = None
    """The label, or the number, of the output that counts; the only one by default."""
    raw: bool = False
    """Whether the score is the model's number, which may be outside of [0, 1]."""
    device: str | None = None
    """cpu, cuda, ...; by default the GPU if there is one."""
    max_tokens: int | None = None
    """The longest text: what a longer one begins with is left out."""
    _loaded: tuple[Any, Any, int] | None = field(default=None, init=False, repr=False)
    _lock: Any = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __call__(self, answer: str, reference: Any = None, prompt: str | None = None) -> float:
        import torch

        model, tokenizer, output = self.load()
        tokens = self._tokens(tokenizer, prompt or "", as_text(answer)).to(model.device)
        with torch.inference_mode():
            scores = model(**tokens).logits[0].double()
        if self.raw:
            return float(scores[output])
        if len(scores) == 1:
            return float(scores[0].sigmoid())
        return float(scores.softmax(0)[output])

    def load(self) -> tuple[Any, Any, int]:
        """The model, its tokenizer and the index of its output; loaded by the first call."""
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def _load(self) -> tuple[Any, Any, int]:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from pliant.loading import torch_device

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model)
            model = AutoModelForSequenceClassification.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelNotFound(f"reward_model: {self.model}: {reason}") from error
        device = torch_device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return model.eval().to(device), tokenizer, self._output(model.config)

    def _output(self, config: Any) -> int:
        labels = {int(index): str(label) for index, label in config.id2label.items()}
        if self.label is None:
            if len(labels) > 1:
                names = ", ".join(labels.values())
                raise InvalidInput(f"reward_model: {self.model} has the labels {names}: give one")
            return 0
        for index, label in labels.items():
            if str(self.label) in (label, str(index)):
                return index
        near = did_you_mean(self.label, labels.values())
        raise InvalidInput(f"reward_model: {self.model} has no label {self.label!r}{near}")

    def _tokens(self, tokenizer: Any, prompt: str, answer: str) -> Any:
        from pliant.data.chat import chat_text, has_chat_template

        tokenizer.truncation_side = "left"  # the answer is at the end
        options: dict[str, Any] = {"return_tensors": "pt"}
        if self.max_tokens is not None:
            options |= {"truncation": True, "max_length": self.max_tokens}
        if has_chat_template(tokenizer):
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            text = chat_text(turns, tokenizer, generation_prompt=False)
            return tokenizer(text, add_special_tokens=False, **options)
        if tokenizer.sep_token is not None:
            return tokenizer(prompt, answer, **options)
        return tokenizer(prompt + answer, **options)
