"""The result of an export, and its README.md: how to use the copy, and how it was verified."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from pliant.complexity.config import Reads
from pliant.errors import InvalidInput


@dataclass(frozen=True)
class ExportResult:
    """The exported model, and how closely it agrees with the scorer."""

    folder: str
    architecture: str
    """The stock class."""
    outputs: tuple[str, ...]
    layers: int
    """As many as the scorer reads; the copy has no others."""
    dtype: str
    difference: float
    """The largest between the logits of the reloaded copy and of the live scorer without `shift`,
    over probe prompts, relative to the largest logit if that is above 1."""
    bound: float
    shift: tuple[float, ...]
    """What to add to each logit of the copy: the head's bias, which stock classes do not have."""
    cpx_token: str
    cpx_token_id: int
    rows_added: int
    """How many rows the copy's embeddings gained."""
    reads: Reads = "probabilities"
    """What the outputs are: probabilities, classes or numbers."""

    def threshold(self, score: float, output: int = 0) -> float:
        """The copy's own score that corresponds to this score of the scorer."""
        if self.reads != "probabilities":
            raise InvalidInput(f"the outputs are {self.reads}: add `shift` to the logits instead")
        if not 0 <= score <= 1:
            raise InvalidInput(f"score={score!r}: a probability, 0 to 1")
        if score in (0, 1):
            return float(score)
        logit = math.log(score / (1 - score)) - self.shift[output]
        return 1 / (1 + math.exp(-logit))

    def as_dict(self) -> dict[str, Any]:
        """All but the folder, which depends on the machine and not on the model."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    def __str__(self) -> str:
        return (
            f"{self.folder}: a stock {self.architecture} of {self.layers} layers, whose logits are "
            f"within {self.difference:.1e} of the scorer's (allowed: {self.bound:g})"
        )


TEXT = """\
---
library_name: transformers
pipeline_tag: text-classification
tags: [pliant]
---

# How hard is a prompt?

A stock `{architecture}` of {layers} layers. {meaning}

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this-folder")
model = AutoModelForSequenceClassification.from_pretrained("this-folder")
inputs = tokenizer(["What is 3 + 4?"], return_tensors="pt", padding=True)
{usage}
```

The tokenizer appends {cpx_token} (id {cpx_token_id}) to every text. Render a chat with the base's
own tokenizer first, and pass the text.

Reloaded with plain transformers, in {dtype}, its logits were within {difference:.1e} of the live
scorer's (allowed: {bound:g}).
{bias}"""

BIAS = """
**The scorer's head has a bias, and this class has no place for it.** The live scorer adds {shift}
to these logits: {advice}.
"""

MEANING = {
    "probabilities": "Its outputs are logits of {outputs}; the sigmoid of\n"
    "`score` is the probability that the prompt is hard for the model that this was made from.",
    "classes": "Its outputs are logits of the classes {outputs};\n"
    "the softmax of them is how likely a prompt is of each.",
    "numbers": "Its outputs are numbers, {outputs}, as they are.",
}
USAGE = {
    "probabilities": "score = torch.sigmoid(model(**inputs).logits)",
    "classes": "shares = torch.softmax(model(**inputs).logits, dim=-1)",
    "numbers": "numbers = model(**inputs).logits",
}


def model_card(result: ExportResult) -> str:
    bias = ""
    if any(result.shift):
        shift = ", ".join(f"{value:+.6g}" for value in result.shift)
        bias = BIAS.format(shift=shift, advice=_advice(result))
    return TEXT.format(
        architecture=result.architecture,
        layers=result.layers,
        meaning=MEANING[result.reads].format(
            outputs=", ".join(f"`{name}`" for name in result.outputs)
        ),
        usage=USAGE[result.reads],
        cpx_token=result.cpx_token,
        cpx_token_id=result.cpx_token_id,
        dtype=result.dtype,
        difference=result.difference,
        bound=result.bound,
        bias=bias,
    )


def _advice(result: ExportResult) -> str:
    if result.reads != "probabilities":
        return "add it"
    return (
        "compare with a threshold that is lower by as much (a score of 0.5 there is\n"
        f"{result.threshold(0.5):.4f} here), or add it"
    )
