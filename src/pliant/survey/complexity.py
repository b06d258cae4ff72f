"""Questions about complexity: does the cache hold, and can a scorer score, learn, be exported?"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pliant.complexity import Complexity, CPXConfig, attach
from pliant.complexity.export import export
from pliant.data.collate import pad_rows
from pliant.errors import PliantError
from pliant.prefill import Batch, Prefilled, prefill
from pliant.survey.capability import YES, Specimen, Verdict, register, yes_if

LENGTHS = (13, 20, 15)
"""Longer than a tiny model's sliding window."""
NEW_TOKENS = 3
PADDING = 3
CLOSE = 1e-4
"""Cached and uncached steps add numbers in different orders."""

_plain: WeakKeyDictionary[Specimen, Tensor] = WeakKeyDictionary()
"""The logits generated without a scorer, which more than one question needs."""


@register("foundation", "cached", needs=["runs"])
def cached(specimen: Specimen) -> Verdict:
    """Does its cache work: does it generate the same with and without?

    Does generation with the cache equal generation without?
    """
    with_cache = generate(specimen, specimen.ids, use_cache=True)
    without = generate(specimen, specimen.ids, use_cache=False)
    return compare(with_cache, without, "with the cache", "without")


@register("complexity", "crop", needs=["cached"])
def crop(specimen: Specimen) -> Verdict:
    """Can the end of a prompt be removed from its cache again?

    Can the last tokens be cropped from its cache without a trace?
    """
    cache = _filled(specimen, record=False)
    if not hasattr(cache, "is_croppable"):
        return Verdict(False, "its forward returns no cache of transformers' kind")
    if _cropped(cache):
        return _continues(specimen, cache, note="")
    cache = _filled(specimen, record=True)
    if _cropped(cache):
        return _continues(specimen, cache, note="after activate_past_recording()")
    return Verdict(False, f"not croppable: {', '.join(_not_croppable(cache))}")


@register("complexity", "left padding", needs=["cached"])
def left_padding(specimen: Specimen) -> Verdict:
    """Can prompts of several lengths be answered in one batch?

    Does padding on the left leave the answers as they are?
    """
    plain = generate(specimen, specimen.ids[:1], use_cache=True)
    padding = torch.full((1, PADDING), _pad_token(specimen))
    ids = torch.cat([padding, specimen.ids[:1]], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :PADDING] = 0
    padded = generate(specimen, ids, use_cache=True, attention_mask=mask)
    return compare(padded, plain, "padded", "plain")


@register("complexity", "scores", needs=["layers"])
@torch.no_grad()
def scores(specimen: Specimen) -> Verdict:
    """Can a scorer on it tell how hard a prompt is?

    Does a prompt have the same score in a padded batch, on a cache and alone in one forward?
    """
    with _scorer(specimen, rows=2, aggregation="mean") as scorer:
        if not torch.equal(specimen.run(), specimen.logits):
            return Verdict(False, "attached but unused, it changes the logits")
        on_right = pad_rows(_prompts())
        on_cache = scorer.logits_of(prefill(scorer.anatomy, *on_right, head=False))
        alone = _alone(scorer, _prompts())
        scored = torch.as_tensor(scorer.score(_prompts()).logits).to(alone)
        return _near(torch.stack([on_cache, scored]), torch.stack([alone, alone]))


@register("complexity", "score + generate", needs=["scores"])
def score_andgenerate(specimen: Specimen) -> Verdict:
    """Can it score a prompt and answer it at once, with the same answer?

    Scored in the prefill, does it generate the same logits as without a scorer?
    """
    return _generates(specimen, layer=None)


@register("complexity", "early exit", needs=["scores", "first k", "resume"])
def early_exit(specimen: Specimen) -> Verdict:
    """Can it score a prompt half-way through its layers, and then answer it?

    Scored at half depth and resumed, does it generate the same logits as without a scorer?
    """
    return _generates(specimen, layer=max(1, len(specimen.anatomy.layers) // 2))


@register("complexity", "learns", needs=["scores"])
def learns(specimen: Specimen) -> Verdict:
    """Can a scorer be trained on prompts that were run once?

    Do the rows have the same gradient on a cache as in one forward over prompt and rows?
    """
    batch = Batch.of(_prompts()[:1])
    with _scorer(specimen, rows=2, aggregation="mean") as scorer:
        logits = scorer.logits(batch.ids_BT)
        (on_cache,) = torch.autograd.grad(logits.sum(), scorer.rows)
        (at_once,) = torch.autograd.grad(scorer.logits_at_once(batch).sum(), scorer.rows)
        if not on_cache.any():
            return Verdict(False, "no gradient reaches the rows")
        return _near(on_cache / at_once.norm(), at_once / at_once.norm())


@register("complexity", "row LoRA", needs=["scores"])
@torch.no_grad()
def row_lora(specimen: Specimen) -> Verdict:
    """Can a scorer have a LoRA of its own?

    Can a LoRA act on the rows alone, with the same result on a cache as in one forward?
    """
    with _scorer(specimen, rows=2, lora_rank=2) as scorer:
        on_cache = scorer.logits_of(prefill(scorer.anatomy, _same_length(), head=False))
        at_once = _alone(scorer, _same_length().tolist())
        for lora in scorer.lora.children():
            lora.b.zero_()  # type: ignore[operator]
        if torch.equal(_alone(scorer, _same_length().tolist()), at_once):
            return Verdict(False, "it has no effect")
        return _near(on_cache, at_once)


@register("complexity", "prefixes", needs=["scores"])
@torch.no_grad()
def prefixes(specimen: Specimen) -> Verdict:
    """Can prompts be stored, and batched again in any order?

    Can each prompt's keys and values be stored alone, and joined into other batches?
    """
    with _scorer(specimen, rows=2) as scorer:
        stored = prefill(scorer.anatomy, *pad_rows(_prompts()), head=False).split()
        joined = Prefilled.join(scorer.anatomy, [stored[2], stored[0]])
        alone = _alone(scorer, [_prompts()[2], _prompts()[0]])
        return _near(scorer.logits_of(joined), alone)


@register("complexity", "export", needs=["layers"])
def exports(specimen: Specimen) -> Verdict:
    """Can a scorer be written as a stock classifier, which needs no Pliant?

    Can a scorer be exported as an equivalent stock classifier, at full and at half depth?

    Half depth makes a smaller model; if only that is impossible, it is a yes with the reason.
    """
    if reason := _why_not(specimen, layer=None):
        return Verdict(False, reason)
    reason = _why_not(specimen, layer=max(1, len(specimen.anatomy.layers) // 2))
    return Verdict(True, f"at full depth only; at half depth, {reason}") if reason else YES


# --- the cache alone -----------------------------------------------------------------------------


def generate(specimen: Specimen, ids: Tensor, **options: Any) -> Tensor:
    """The logits of a few greedy steps, (batch, step, vocabulary)."""
    result = specimen.model.generate(ids, **{**_greedy(specimen, ids), **options})
    return torch.stack(result.logits, dim=1)


def _greedy(specimen: Specimen, ids: Tensor) -> dict[str, Any]:
    """The options of generation; the mask is explicit, since ids may equal the padding token."""
    return {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "pad_token_id": _pad_token(specimen),
    }


@torch.no_grad()
def _filled(specimen: Specimen, record: bool) -> Any:
    """A cache that holds the prompts; with `record`, it also records what it overwrites."""
    inputs: dict[str, Any] = {"use_cache": True}
    if record:
        from transformers import DynamicCache

        cache = DynamicCache(config=specimen.anatomy.config)
        cache.activate_past_recording()
        inputs["past_key_values"] = cache
    output = specimen.model(input_ids=specimen.ids, **inputs)
    return getattr(output, "past_key_values", None)


def _cropped(cache: Any) -> bool:
    """Crop the last two tokens, if the cache can and still holds what came before."""
    if not cache.is_croppable:
        return False
    try:
        cache.crop(-2)
    except RuntimeError:
        return False
    return True


@torch.no_grad()
def _continues(specimen: Specimen, cache: Any, note: str) -> Verdict:
    """Run the last two tokens again on the cropped cache: their logits must be the same."""
    again = specimen.model(input_ids=specimen.ids[:, -2:], past_key_values=cache, use_cache=True)
    close = torch.allclose(again.logits[:, -2:], specimen.logits[:, -2:], atol=CLOSE)
    return Verdict(close, note if close else "cropped, it continues to other logits")


def _not_croppable(cache: Any) -> list[str]:
    layers = [layer for layer in getattr(cache, "layers", []) if not layer.is_croppable]
    return sorted({type(layer).__name__ for layer in layers}) or [type(cache).__name__]


def _pad_token(specimen: Specimen) -> int:
    pad = getattr(specimen.model.config, "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0


def compare(ours: Tensor, theirs: Tensor, case: str, reference: str) -> Verdict:
    if ours.shape != theirs.shape:
        return Verdict(False, f"{tuple(ours.shape)} {case}, {tuple(theirs.shape)} {reference}")
    if torch.allclose(ours, theirs, atol=CLOSE):
        return YES
    # Different machines agree on the order of magnitude only.
    magnitude = 10.0 ** math.ceil(math.log10((ours - theirs).abs().max().item()))
    return Verdict(False, f"logits differ by up to {magnitude:g} {case}")


# --- with a scorer -------------------------------------------------------------------------------


def _generates(specimen: Specimen, layer: int | None) -> Verdict:
    ids = _same_length()
    if specimen not in _plain:
        _plain[specimen] = generate(specimen, ids)
    with _scorer(specimen, layer=layer) as scorer:
        generated = scorer.generate(ids, **_greedy(specimen, ids))
        alone = _alone(scorer, ids.tolist())
    logits = torch.stack(generated.outputs[0].logits, dim=1)
    if not torch.equal(logits.nan_to_num(), _plain[specimen].nan_to_num()):
        return Verdict(False, "scored in the prefill, it generates other logits")
    verdict = _near(torch.as_tensor(generated.scores.logits, dtype=alone.dtype), alone)
    note = "the prompts are run twice" if generated.prefilled_again else ""
    return Verdict(True, note) if verdict.ok else verdict


@contextmanager
def _scorer(specimen: Specimen, **settings: Any) -> Iterator[Complexity]:
    """An attached scorer with random weights, which is detached at the end."""
    scorer = attach(specimen.model, CPXConfig(outputs=("score", "gain"), **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in scorer.named_parameters():
            if name != "rows":
                spread = 0.05 if name.startswith("lora") else 0.3
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    try:
        yield scorer
    finally:
        scorer.detach()


@torch.no_grad()
def _alone(scorer: Complexity, prompts: Sequence[list[int]]) -> Tensor:
    """The logits of each prompt alone, in one forward without a cache."""
    return torch.cat([scorer.logits_at_once(Batch.of([prompt])) for prompt in prompts])


def _prompts() -> list[list[int]]:
    """Ordinary tokens; the special ones are at both ends of a tiny vocabulary."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 100, (n,), generator=generator).tolist() for n in LENGTHS]


def _same_length() -> Tensor:
    return torch.tensor([prompt[: min(LENGTHS)] for prompt in _prompts()[:2]])


def _near(ours: Tensor, theirs: Tensor) -> Verdict:
    if not ours.isfinite().all():
        return Verdict(False, "its scores are not finite")
    close = torch.allclose(ours, theirs, atol=CLOSE, rtol=CLOSE)
    return yes_if(close, "on the cache it gives other scores")


def _why_not(specimen: Specimen, layer: int | None) -> str:
    """Why it cannot be exported, without the names of types; empty if it can."""
    try:
        _export(specimen, layer)
    except PliantError as error:
        reason = str(error).partition(":")[0].replace(type(specimen.model).__name__, "it")
        kind = r"(the )?(reloaded )?\w+ForSequenceClassification"
        return re.sub(kind, r"its \2sequence classifier", reason)
    return ""


def _export(specimen: Specimen, layer: int | None) -> None:
    scorer = attach(specimen.model, CPXConfig(bias=False, layer=layer), name="export")
    try:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            scorer.head.weight.normal_(generator=generator)
        with tempfile.TemporaryDirectory() as folder:
            export(scorer, Path(folder) / "stock", _byte_tokenizer(scorer.anatomy.embeddings))
    finally:
        scorer.detach()


def _byte_tokenizer(embeddings: torch.nn.Module) -> PreTrainedTokenizerFast:
    """A tokenizer of as many bytes as there are embeddings.

    It is of the kind that most models have, because transformers loads some types with their own
    tokenizer class, whatever was saved.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rows = min(len(alphabet), getattr(embeddings, "num_embeddings", len(alphabet)))
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet[:rows])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=alphabet[0])
