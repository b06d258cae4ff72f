"""Export a scorer as a stock `*ForSequenceClassification` whose tokenizer appends [CPX] by itself.

    result = export(scorer, "difficulty", tokenizer)
    AutoModelForSequenceClassification.from_pretrained("difficulty")   # no Pliant needed

The copy may have one more row in its embeddings; the base in memory is not changed. The copy is
written to a temporary folder, reloaded with plain transformers, compared, and only then renamed to
its target. A scorer without a stock form, or whose copy disagrees, is refused with the reason.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pliant import __version__
from pliant.adapters.fingerprint import is_packed
from pliant.complexity.config import Reads
from pliant.complexity.scorer import PromptScorer
from pliant.complexity.stock import Stock, prove, stock_model, stock_tokenizer
from pliant.complexity.tokenizer import CPXTokenizer
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.files import check_new, new_folder

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.01}
"""The largest allowed difference from a live scorer's logit, relative to the largest logit if that
is above 1. In half precision the stock class computes its logits in that precision, the scorer in
fp32: over tiny models of 61 types the largest difference was 1.1e-6 in fp32, 0.023 in bf16 and
0.0022 in fp16."""
RECORD = "pliant_export.json"


def export(
    scorer: PromptScorer,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    calibration: Any = None,
    rendered: bool = False,
) -> ExportResult:
    """Write the scorer and its base to `folder` as one stock checkpoint, proven equal.

    `tokenizer` is the base's or a `CPXTokenizer` (left out: the scorer's own). A temperature or
    Platt `calibration` of its outputs goes into the head. With `rendered` the texts will be
    rendered chats, which include their own BOS token: the tokenizer then adds [CPX] alone.
    """
    target = Path(folder).expanduser()
    check_new(target)
    _check_form(scorer)
    cpx = _cpx(tokenizer or scorer.tokenizer)
    scale, shift = _calibrated(scorer, calibration)
    stock = stock_model(scorer, cpx, scale, shift)
    with new_folder(target) as unfinished:
        stock.model.save_pretrained(unfinished)
        _save_tokenizer(stock_tokenizer(cpx, rendered), unfinished)
        proof = prove(scorer, cpx, unfinished, stock, scale, rendered)
        result = _result(scorer, cpx, target, stock, proof)
        _check_agreement(result, scorer.config.layer)
        (unfinished / RECORD).write_text(
            json.dumps({"pliant": __version__, **result.as_dict()}, indent=2) + "\n"
        )
        (unfinished / "README.md").write_text(model_card(result))
    return result


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


def _result(
    scorer: PromptScorer, cpx: CPXTokenizer, target: Path, stock: Stock, difference: float
) -> ExportResult:
    depth = len(scorer.anatomy.layers)
    return ExportResult(
        folder=str(target),
        architecture=stock.architecture,
        outputs=scorer.config.outputs,
        layers=depth if scorer.config.layer is None else scorer.config.layer,
        dtype=str(stock.dtype).removeprefix("torch."),
        difference=difference,
        bound=BOUNDS[stock.dtype],
        shift=tuple(stock.left_out.tolist()),
        cpx_token=cpx.cpx_token,
        cpx_token_id=cpx.cpx_token_id,
        rows_added=stock.rows_added,
        reads=scorer.config.reads,
    )


def _check_agreement(result: ExportResult, layer: int | None) -> None:
    if result.difference <= result.bound:
        return
    cause = f" (its first {layer} layers seem to compute something else on their own)"
    raise UnsupportedModel(
        f"the reloaded {result.architecture} does not agree with the scorer: its logits differ by "
        f"{result.difference:.2g}, and {result.bound:g} is allowed in {result.dtype}. Nothing was "
        f"written{'' if layer is None else cause}"
    )


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Under the class's older name, which all versions of transformers know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_form(scorer: PromptScorer) -> None:
    """Refuse what no stock sequence classifier can express."""
    config = scorer.config
    if config.rows > 1:
        raise UnsupportedModel(
            f"the scorer has {config.rows} [CPX] rows, and a stock classifier reads one token: "
            "train one with rows=1 to export it"
        )
    if config.lora_rank:
        raise UnsupportedModel(
            "its LoRA acts on the [CPX] position alone, and a stock checkpoint has one set of "
            "weights for all positions: train one with lora_rank=0 to export it"
        )
    base: Any = scorer.base
    if is_packed(base):
        raise UnsupportedModel("its base is quantised: load the base in 16 or 32 bits to export it")
    if any(p.is_meta for p in base.parameters()):
        raise UnsupportedModel("part of its base is offloaded: load all of the base to export it")
    dtype = scorer.anatomy.embeddings.weight.dtype
    if dtype not in BOUNDS:
        raise UnsupportedModel(f"its base is in {dtype}: export it from fp32, bf16 or fp16")


def _cpx(tokenizer: Any) -> CPXTokenizer:
    if tokenizer is None:
        raise InvalidInput(
            "the scorer has no tokenizer: pass the base's, export(folder, tokenizer)"
        )
    return tokenizer if isinstance(tokenizer, CPXTokenizer) else CPXTokenizer.of(tokenizer)


def _calibrated(scorer: PromptScorer, calibration: Any) -> tuple[float, float]:
    """The slope and the shift of a calibration in logits."""
    if calibration is None:
        return 1.0, 0.0
    fitted = calibration.to_json()
    if "gain" in scorer.config.outputs or scorer.config.reads != "probabilities":
        what = "the gain" if "gain" in scorer.config.outputs else scorer.config.reads
        raise UnsupportedModel(f"a calibration of probabilities cannot be applied to {what}")
    if fitted["kind"] == "temperature":
        return 1 / fitted["temperature"], 0.0
    if fitted["kind"] == "platt":
        return fitted["slope"], fitted["shift"]
    raise UnsupportedModel(
        f"{fitted['kind']} calibration is a table of steps, which no linear head can hold: export "
        "without it and apply it to the copy's outputs, or calibrate by temperature"
    )


# --- the card ------------------------------------------------------------------------------------

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
    outputs = ", ".join(f"`{name}`" for name in result.outputs)
    meaning = MEANING[result.reads].format(outputs=outputs)
    return TEXT.format(meaning=meaning, usage=USAGE[result.reads], bias=bias, **asdict(result))


def _advice(result: ExportResult) -> str:
    if result.reads != "probabilities":
        return "add it"
    return (
        "compare with a threshold that is lower by as much (a score of 0.5 there is\n"
        f"{result.threshold(0.5):.4f} here), or add it"
    )
