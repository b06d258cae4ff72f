"""Export a scorer as a stock `*ForSequenceClassification` whose tokenizer appends [CPX] by itself.

    result = export(scorer, "difficulty", tokenizer)
    AutoModelForSequenceClassification.from_pretrained("difficulty")   # no Pliant needed

The copy may have one more row in its embeddings; the base in memory is not changed. The copy is
written to a temporary folder, reloaded with plain transformers, compared, and only then renamed to
its target. A scorer without a stock form, or whose copy disagrees, is refused with the reason.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pliant import __version__, prefill
from pliant.complexity.export.result import ExportResult, model_card
from pliant.complexity.export.stock import Stock, stock_model, stock_tokenizer, table_of
from pliant.complexity.scorer import PromptScorer
from pliant.complexity.tokenizer import CPXTokenizer
from pliant.errors import AdapterError, InvalidInput, UnsupportedModel
from pliant.prefill import Batch

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
    _check_free(target)
    _check_form(scorer)
    cpx = _cpx(tokenizer or scorer.tokenizer)
    scale, shift = _calibrated(scorer, calibration)
    stock = stock_model(scorer, cpx, _head(scorer, scale), shift)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.unfinished-", dir=target.parent))
    try:
        stock.model.save_pretrained(unfinished)
        _save_tokenizer(stock_tokenizer(cpx, rendered), unfinished)
        proof = prove(scorer, cpx, unfinished, stock, scale, rendered)
        result = _result(scorer, cpx, target, stock, proof)
        if not proof <= result.bound:
            raise UnsupportedModel(
                f"the reloaded {stock.architecture} does not agree with the scorer: its logits "
                f"differ by {proof:.2g}, and {result.bound:g} is allowed in {result.dtype}. "
                f"Nothing was written{_likely_cause(scorer)}"
            )
        (unfinished / RECORD).write_text(
            json.dumps({"pliant": __version__, **result.as_dict()}, indent=2) + "\n"
        )
        (unfinished / "README.md").write_text(model_card(result))
        unfinished.chmod(0o755)
        unfinished.replace(target)
    except OSError as error:
        raise AdapterError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return result


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


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Under the class's older name, which all versions of transformers know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_free(target: Path) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InvalidInput(f"{target} exists: name a new folder for the exported model")


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
    if getattr(base, "is_quantized", False):
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


def _head(scorer: PromptScorer, scale: float) -> tuple[Tensor, Tensor]:
    """The head's weight and bias, a calibration's slope included."""
    weight = scorer.head.weight.detach() * scale
    bias = scorer.head.bias
    return weight, (torch.zeros_like(weight[:, 0]) if bias is None else bias.detach() * scale)


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


def _likely_cause(scorer: PromptScorer) -> str:
    if scorer.config.layer is None:
        return ""
    return f" (its first {scorer.config.layer} layers seem to compute something else on their own)"


# --- verification --------------------------------------------------------------------------------

TEXTS = (
    "What is 3 + 4?",
    "x",
    "[CPX] This is easy. [CPX] Or is it?",
    "Naïve café, 日本語 🙂\n\tand a tab",
    "The quick brown fox jumps over the lazy dog, again and again and again.",
)
LENGTHS = (3, 9, 21, 40, 60, 61)
"""Lengths of prompts of random tokens, some longer than a tiny model's window. (A-X K2's sparse
attention selects other positions in a padded batch than alone; the longer prompts detect it.)"""


@torch.no_grad()
def prove(
    scorer: PromptScorer,
    cpx: CPXTokenizer,
    folder: Path,
    stock: Stock,
    scale: float,
    rendered: bool,
) -> float:
    """Reload the copy with plain transformers and compare it with the live scorer: the largest
    difference of a logit, relative to the largest logit if that is above 1.

    The copy scores texts through its reloaded tokenizer, in a padded batch, with the trained head
    and with a random one: an untrained head, all zeros, would agree with anything.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [*_of_texts(cpx, tokenizer, rendered), *_random(scorer, cpx)]
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=stock.dtype, attn_implementation=scorer.anatomy.config._attn_implementation
    ).eval()
    model = model.to(scorer.rows.device)
    inputs = tokenizer.pad(
        {"input_ids": [[*ids, cpx.cpx_token_id] for ids in prompts]}, return_tensors="pt"
    ).to(scorer.rows.device)
    hidden_BD = torch.cat([_hidden(scorer, ids) for ids in prompts]).float()
    head = model.get_submodule(stock.head)
    trained = scorer.head.weight.float() * scale
    random = torch.randn(trained.shape, generator=torch.Generator().manual_seed(0))
    random = random.to(trained) / trained.shape[1] ** 0.5
    logits = model(**inputs).logits.float()
    if head.bias is not None:
        logits = logits - head.bias.float()
        head.bias.zero_()
    first = _difference(logits, F.linear(hidden_BD, trained))
    head.weight.copy_(random)
    second = _difference(model(**inputs).logits.float(), F.linear(hidden_BD, random))
    return max(first, second)


def _difference(ours_BL: Tensor, theirs_BL: Tensor) -> float:
    largest = max(1.0, float(theirs_BL.abs().max()))
    difference = float((ours_BL - theirs_BL).abs().max()) / largest
    return difference if difference == difference else float("inf")


def _hidden(scorer: PromptScorer, ids: list[int]) -> Tensor:
    """The hidden state that the live scorer's head reads for one prompt, (1, D)."""
    batch = Batch.of([ids], device=scorer.device)
    hidden = prefill.on_top(
        scorer.anatomy,
        batch,
        scorer.placeholders(1),
        layers=scorer.config.layer,
        step_context=scorer.activate,
    )
    return hidden[:, -1].to(scorer.head.weight.device)


def _of_texts(cpx: CPXTokenizer, tokenizer: Any, rendered: bool) -> list[list[int]]:
    """The texts' ids without [CPX]; the reloaded tokenizer must agree on all of them."""
    encoded = []
    for text in TEXTS:
        ids = cpx(text, add_special_tokens=not rendered)["input_ids"]
        theirs = tokenizer(text)["input_ids"]
        if ids != theirs:
            raise UnsupportedModel(
                f"the tokenizer, reloaded by plain transformers as a {type(tokenizer).__name__}, "
                f"encodes {text!r} as {theirs}, and not as {ids}"
            )
        encoded.append(ids[:-1])
    return [ids for ids in encoded if ids]


def _random(scorer: PromptScorer, cpx: CPXTokenizer) -> list[list[int]]:
    special = set(cpx.all_special_ids)
    rows = min(len(table_of(scorer)), cpx.cpx_token_id)
    vocabulary = [i for i in range(rows) if i not in special]
    generator = torch.Generator().manual_seed(0)
    longest = scorer.max_prompt_length or max(LENGTHS)
    shapes = [(min(length, longest),) for length in LENGTHS]
    draws = [torch.randint(len(vocabulary), shape, generator=generator) for shape in shapes]
    return [[vocabulary[i] for i in draw.tolist()] for draw in draws]
