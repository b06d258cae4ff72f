"""The stock model and tokenizer that a scorer is exported as, and the proof that they agree.

The model shares the base's tensors: only its embeddings, if they gain a row, and its head are new.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from pliant.anatomy.config import truncated_config
from pliant.complexity.post_processor import cpx_post_processor
from pliant.complexity.scorer import PromptScorer
from pliant.complexity.tokenizer import CPXTokenizer
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.prefill import Batch

PADDING = ("pad_token", "eos_token", "bos_token", "unk_token")
"""Tokens to pad with, in order of preference; the last unpadded token is always [CPX]."""
PROBLEM = {
    "probabilities": "multi_label_classification",
    "classes": "single_label_classification",
    "numbers": "regression",
}
"""The name that transformers has for each kind of output."""
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")
SETTINGS = ("model_max_length", "truncation_side", "clean_up_tokenization_spaces")


@dataclass(frozen=True, eq=False)
class Stock:
    """A sequence classifier that is not verified yet."""

    model: Any
    architecture: str
    dtype: torch.dtype
    head: str
    """The path of its head's module."""
    left_out: Tensor
    """The bias of each output, if the class has no place for one."""
    rows_added: int


def stock_model(scorer: PromptScorer, cpx: CPXTokenizer, scale: float, shift: float) -> Stock:
    """The base's decoder, or its first layers, with [CPX] among the embeddings and the head, whose
    logits are those of the scorer times `scale`, plus `shift`."""
    base: Any = scorer.base
    table = table_of(scorer)
    if cpx.cpx_token_id > len(table):
        raise InvalidInput(
            f"the tokenizer has ids up to {cpx.cpx_token_id - 1}, and the base has {len(table)} "
            "embeddings: is the tokenizer another model's?"
        )
    config = _config(scorer, cpx, table)
    model = _build(config, table.dtype)
    own, stock = base.state_dict(), model.state_dict()
    new = sorted(stock.keys() - own.keys())
    head = scorer.head.weight.detach() * scale
    weight, bias = _head_keys(type(model).__name__, new, stock, head)
    state = {key: own[key] for key in stock.keys() - set(new)}
    name = next(name for name, p in base.state_dict(keep_vars=True).items() if p is table)
    state[name], added = _with_row(scorer, cpx, table, stock[name].shape[0])
    state[weight] = head.to(table.dtype)
    own_bias = torch.zeros_like(head[:, 0]) if scorer.head.bias is None else scorer.head.bias
    left_out = own_bias.detach() * scale + shift
    if bias is not None:
        state[bias] = left_out.to(table.dtype)
        left_out = torch.zeros_like(left_out)
    _check_shapes(type(model).__name__, state, stock)
    model.load_state_dict(state, assign=True)
    path = weight.removesuffix(".weight")
    return Stock(model, type(model).__name__, table.dtype, path, left_out.float().cpu(), added)


def stock_tokenizer(cpx: CPXTokenizer, rendered: bool = False) -> PreTrainedTokenizerFast:
    """A PreTrainedTokenizerFast whose post-processor appends [CPX] to every text.

    It pads on the right, as a model without position ids expects. It has no chat template, because
    a stock tokenizer skips the post-processor, and so [CPX], when it renders one.
    """
    base = cpx.base
    backend = copy.deepcopy(base._tokenizer)
    backend.post_processor = cpx_post_processor(
        backend.post_processor, cpx.cpx_token, cpx.cpx_token_id, add_special_tokens=not rendered
    )
    special = {name: value for name in SPECIAL if (value := getattr(base, name, None))}
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="right",
        pad_token=padding_token(base),
        model_input_names=["input_ids", "attention_mask"],
        **special,
        **{name: getattr(base, name) for name in SETTINGS if hasattr(base, name)},
    )
    return tokenizer


def padding_token(base: Any) -> str:
    for name in PADDING:
        if token := getattr(base, name, None):
            return str(token)
    raise InvalidInput(
        f"{type(base).__name__} has no token to pad with ({', '.join(PADDING)}), and batches of a "
        "stock classifier need one: tokenizer.pad_token = ..."
    )


def table_of(scorer: PromptScorer) -> Tensor:
    table = getattr(scorer.anatomy.embeddings, "weight", None)
    if not isinstance(table, Tensor) or table.dim() != 2:
        kind = type(scorer.anatomy.embeddings).__name__
        raise UnsupportedModel(f"its embeddings, a {kind}, are not a table that could gain a row")
    return table


def _config(scorer: PromptScorer, cpx: CPXTokenizer, table: Tensor) -> Any:
    base: Any = scorer.base
    depth = len(scorer.anatomy.layers)
    config: Any = truncated_config(base.config, depth, scorer.config.layer or depth)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UnsupportedModel(
            f"transformers has no sequence classifier beside {type(base).__name__}"
        )
    outputs = scorer.config.outputs
    config.id2label = dict(enumerate(outputs))
    config.label2id = {name: i for i, name in enumerate(outputs)}
    config.problem_type = PROBLEM[scorer.config.reads]
    pad = cpx.convert_tokens_to_ids(padding_token(cpx.base))
    for part in (config, config.get_text_config(decoder=True)):
        part.pad_token_id = pad
        part.vocab_size = max(table.shape[0], cpx.cpx_token_id + 1)
    vars(config).pop("quantization_config", None)  # left over from a GGUF file: the base is dense
    return config


def _build(config: Any, dtype: torch.dtype) -> Any:
    """The model without weights; the base's are assigned to it later."""
    try:
        with torch.device("meta"), no_init_weights():
            return AutoModelForSequenceClassification.from_config(config, dtype=dtype).eval()
    except Exception as error:  # whatever a constructor may raise over fewer layers
        message = " ".join(str(error).split())[:200]
        raise UnsupportedModel(
            f"transformers cannot build a sequence classifier of this config: "
            f"{type(error).__name__}: {message}"
        ) from error


def _head_keys(
    kind: str, new: list[str], stock: dict[str, Tensor], wanted: Tensor
) -> tuple[str, str | None]:
    """The keys of the head's weight and bias, if any; the class may add no others to the base."""
    weights = [key for key in new if stock[key].shape == wanted.shape and key.endswith(".weight")]
    rest = [key for key in new if key not in weights]
    biases = [key for key in rest if weights and key == weights[0].replace(".weight", ".bias")]
    if len(weights) != 1 or rest != biases:
        raise UnsupportedModel(
            f"{kind} does not read one token by one linear layer: beside the base it has "
            f"{', '.join(new) or 'nothing'}, and the head is a matrix of {list(wanted.shape)}"
        )
    return weights[0], biases[0] if biases else None


def _with_row(
    scorer: PromptScorer, cpx: CPXTokenizer, table: Tensor, rows: int
) -> tuple[Tensor, int]:
    """The table with the [CPX] row at its id, and how many rows it gained."""
    extended = torch.zeros(rows, table.shape[1], dtype=table.dtype, device=table.device)
    extended[: len(table)] = table.detach()
    extended[cpx.cpx_token_id] = (scorer.rows[0].detach() / _scale(scorer)).to(extended)
    return extended, rows - len(table)


@torch.no_grad()
def _scale(scorer: PromptScorer) -> float:
    """The factor that the embedding module applies to a row; the scorer's row is its output."""
    table = table_of(scorer)
    ids = torch.arange(min(64, len(table)), device=table.device)
    out, rows = scorer.anatomy.embeddings(ids).float(), table[ids].float()
    if out.shape != rows.shape:
        raise UnsupportedModel(
            f"its embeddings turn a row of {rows.shape[1]} numbers into {tuple(out.shape[1:])}"
        )
    scale = float((out * rows).sum() / (rows * rows).sum())
    if scale == 0 or not torch.allclose(out, rows * scale, rtol=1e-2, atol=1e-4):
        raise UnsupportedModel("its embeddings do more to a row than scale it")
    return scale


def _check_shapes(kind: str, state: dict[str, Tensor], stock: dict[str, Tensor]) -> None:
    for key, tensor in state.items():
        if tensor.shape != stock[key].shape:
            raise UnsupportedModel(
                f"{kind} wants {key} in shape {list(stock[key].shape)}, and the base has "
                f"{list(tensor.shape)}"
            )


# --- the proof -----------------------------------------------------------------------------------

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
    head = model.get_submodule(stock.head)
    trained = scorer.head.weight.float() * scale
    batches = [Batch.of([ids], device=scorer.device) for ids in prompts]
    hidden_BD = torch.cat([scorer.hidden(batch)[:, -1] for batch in batches]).to(trained)
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
