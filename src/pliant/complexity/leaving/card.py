"""The README.md of an exported scorer: what it says, how to ask it, and how it was proven."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pliant.complexity.export import ExportResult

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
{said}
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
SAID = {
    "probabilities": "score = torch.sigmoid(model(**inputs).logits)",
    "classes": "shares = torch.softmax(model(**inputs).logits, dim=-1)",
    "numbers": "numbers = model(**inputs).logits",
}


def card(result: ExportResult) -> str:
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
        said=SAID[result.reads],
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
