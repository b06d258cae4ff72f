"""Run where Pliant cannot be imported: what an exported scorer says of some prompts, as JSON."""

from __future__ import annotations

import json
import sys

sys.modules["pliant"] = None  # type: ignore[assignment]

import torch  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402

if __name__ == "__main__":
    folder, *prompts = sys.argv[1:]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    inputs = AutoTokenizer.from_pretrained(folder)(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        print(json.dumps([type(model).__name__, model(**inputs).logits.tolist()]))
