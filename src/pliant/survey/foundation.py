"""Questions that all parts depend on: does a model run, and is it built as anatomy says?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pliant.anatomy.blocks import as_projection, projections
from pliant.anatomy.config import read, text_config
from pliant.anatomy.find import find_embeddings
from pliant.errors import UnsupportedModel
from pliant.survey.capability import YES, Specimen, Verdict, register, yes_if


@register("foundation", "runs")
def runs(specimen: Specimen) -> Verdict:
    """Can a tiny copy of it be built, and does it run?

    Does a tiny copy build and give finite logits?
    """
    logits, ids = specimen.logits, specimen.ids
    if logits.shape[:2] != ids.shape:
        return Verdict(False, f"logits of shape {tuple(logits.shape)} for ids {tuple(ids.shape)}")
    return yes_if(bool(logits.isfinite().all()), "its logits are not finite")


@register("foundation", "embeddings", needs=["runs"])
def embeddings(specimen: Specimen) -> Verdict:
    """Does Pliant find its embeddings?

    Are embeddings and hidden size known, and do they embed?
    """
    table = find_embeddings(specimen.model)
    if table is None:
        return Verdict(False, "it has no module that embeds tokens")
    if _hidden_size(specimen) is None:
        return Verdict(False, "neither its config nor its layers have a hidden size")
    outputs: list[Tensor] = []
    with table.register_forward_hook(lambda _, __, output: outputs.append(output)):
        specimen.run()
    # Reformer pads the prompt before embedding it, so there may be more vectors than tokens.
    vectors = outputs[0].shape[:-1].numel() if outputs else 0
    return yes_if(vectors >= specimen.ids.numel(), f"they give {vectors} vectors")


@register("foundation", "layers", needs=["runs"])
def layers(specimen: Specimen) -> Verdict:
    """Can Pliant read this architecture: does it find the layers?

    Are the layers known, and does each of them run?
    """
    calls = _layer_calls(specimen)
    idle = [i for i in range(len(specimen.anatomy.layers)) if i not in calls]
    if not idle:
        return YES
    if all("another modality" in (specimen.anatomy.why_no_attention(i) or "") for i in idle):
        return Verdict(True, f"layers like {idle[0]} run only when there is an image")
    return Verdict(False, f"layers {idle} never run")


@register("foundation", "in order", needs=["layers"])
def in_order(specimen: Specimen) -> Verdict:
    """Do its layers run one after the other?

    Does each layer run exactly once, in order?
    """
    calls = _layer_calls(specimen)
    first = ", ".join(map(str, calls[:8]))
    reason = f"{len(specimen.anatomy.layers)} layers make {len(calls)} calls: {first}, ..."
    return yes_if(calls == sorted(set(calls)), reason)


@register("structure", "attention", needs=["layers"])
def attention(specimen: Specimen) -> Verdict:
    """Does Pliant find its attention heads?

    Are the output projections of attention known?
    """
    anatomy = specimen.anatomy
    blocks = [block for i in range(len(anatomy.layers)) for block in anatomy.attentions(i)]
    parts = [(block.output, block.heads * block.head_dim) for block in blocks]
    return _has_widths(specimen, parts, anatomy.why_no_attention)


@register("structure", "mlp", needs=["layers"])
def mlp(specimen: Specimen) -> Verdict:
    """Does Pliant find the channels of its MLP?

    Is the down projection of the MLP known?
    """
    anatomy = specimen.anatomy
    blocks = [block for i in range(len(anatomy.layers)) for block in anatomy.mlps(i)]
    return _has_widths(specimen, [(b.down, b.width) for b in blocks], anatomy.why_no_mlp)


@register("gradients", "head", needs=["layers"])
@torch.no_grad()
def head(specimen: Specimen) -> Verdict:
    """Does Pliant find its output layer?

    Does the decoder, then the head, give the model's logits?
    """
    anatomy = specimen.anatomy
    if anatomy.head is None:
        return Verdict(False, "it has no known projection to the vocabulary")
    output = anatomy.decoder(input_ids=specimen.ids, use_cache=False)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        return Verdict(False, f"{type(anatomy.decoder).__name__} gives no last_hidden_state")
    projection = as_projection(anatomy.head)
    if projection is not None and projection.inputs != hidden.shape[-1]:
        return Verdict(
            False, f"the head takes {projection.inputs} features, not {hidden.shape[-1]}"
        )
    logits = anatomy.head(hidden)
    if logits.shape != specimen.logits.shape:
        return Verdict(False, f"the head gives {tuple(logits.shape)}")
    return _compare_logits(logits, specimen.logits)


@register("gradients", "chosen logits", needs=["runs"])
def chosen_logits(specimen: Specimen) -> Verdict:
    """Can it predict at selected positions alone?

    Can it compute logits at chosen positions alone?
    """
    positions = torch.tensor([1, 4, specimen.ids.shape[1] - 1])
    chosen = specimen.run(logits_to_keep=positions)
    if chosen.shape[1] != len(positions):
        return Verdict(False, "it takes no logits_to_keep")
    close = torch.allclose(chosen, specimen.logits[:, positions], atol=1e-5)
    return yes_if(close, "they differ from the whole sequence's")


@register("complexity", "first k", needs=["layers"])
def first_layers(specimen: Specimen) -> Verdict:
    """Can its first layers run alone?

    Run alone, do the first layers give the model's own hidden state?
    """
    reason = specimen.depth.first_layers
    return yes_if(reason is None, reason or "")


@register("complexity", "resume", needs=["layers"])
def resume(specimen: Specimen) -> Verdict:
    """Can it stop half-way through its layers, and go on?

    Stopped at half depth and resumed, does it give the same bits?
    """
    reason = specimen.depth.resume
    return yes_if(reason is None, reason or "")


@register("experts", "projections", needs=["layers"])
def adaptable(specimen: Specimen) -> Verdict:
    """Does Pliant find weights that an expert can adapt?

    Are there projections that an expert can adapt?

    An expert adapts modules that are called as such, which fused MoE weights are not.
    """
    modules = [
        (projection.module, i)
        for i, layer in enumerate(specimen.anatomy.layers)
        for projection in projections(layer)
    ]
    ran = {index for index, _ in _calls(specimen, modules)}
    without = sorted(set(_layer_calls(specimen)) - ran)
    if not ran:
        return Verdict(False, "no layer calls a projection as a module")
    return Verdict(True, f"in {len(ran)} of {len(ran) + len(without)} layers" if without else "")


def _has_widths(
    specimen: Specimen,
    parts: Sequence[tuple[nn.Module, int]],
    why_not: Callable[[int], str | None],
) -> Verdict:
    """Whether each module gets as many features as anatomy says; which layers lack the part."""
    reasons = (why_not(index) for index in range(len(specimen.anatomy.layers)))
    lacking = "; ".join(dict.fromkeys(reason for reason in reasons if reason))
    if not parts:
        return Verdict(False, lacking)
    calls = [(inputs[0].shape[-1], due) for due, inputs in _calls(specimen, parts)]
    wrong = [f"one takes {width} features, not {due}" for width, due in calls if width != due]
    if wrong or not calls:
        return Verdict(False, wrong[0] if wrong else "they are not called as modules")
    return Verdict(True, f"in some layers only: {lacking}" if lacking else "")


def _hidden_size(specimen: Specimen) -> int | None:
    """Anatomy's hidden size, or the config's if the layers are unknown."""
    try:
        return specimen.anatomy.hidden_size
    except UnsupportedModel:
        size = read(text_config(specimen.model), "hidden_size")
        return size if isinstance(size, int) else None


def _layer_calls(specimen: Specimen) -> list[int]:
    """Which layers one forward runs, in order."""
    layers = [(layer, i) for i, layer in enumerate(specimen.anatomy.layers)]
    return [index for index, _ in _calls(specimen, layers)]


def _calls(
    specimen: Specimen, modules: Sequence[tuple[nn.Module, int]]
) -> list[tuple[int, tuple[Any, ...]]]:
    """What one forward calls of some modules, in order: a module's number, and its inputs."""
    calls: list[tuple[int, tuple[Any, ...]]] = []

    def record(number: int) -> Callable[..., None]:
        return lambda _, inputs: calls.append((number, inputs))

    specimen.run_hooked(*[(module, record(number)) for module, number in modules])
    return calls


def _compare_logits(ours: Tensor, theirs: Tensor) -> Verdict:
    """Whether they are equal; if not, whether the model scales (Granite) or caps (Gemma 2) them."""
    if torch.allclose(ours, theirs, atol=1e-5):
        return YES
    factor = ((ours * theirs).sum() / (ours * ours).sum()).item()
    if torch.allclose(factor * ours, theirs, atol=1e-5):
        return Verdict(False, f"the model scales its logits by {factor:.4g} after the head")
    if torch.equal(ours.argsort(-1), theirs.argsort(-1)):
        return Verdict(False, "the model caps its logits after the head")
    return Verdict(False, "more than the head lies between hidden states and logits")
