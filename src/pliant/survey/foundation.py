"""What the ground of Pliant asks: that a model runs, and is made as anatomy says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pliant.anatomy import Attention
from pliant.anatomy.config import read, text_config
from pliant.anatomy.find import find_embeddings
from pliant.anatomy.projection import as_projection
from pliant.errors import UnsupportedModel
from pliant.survey.capability import Verdict, register
from pliant.survey.specimen import Specimen

YES = Verdict(True)


@register("foundation", "runs", "Does a tiny copy build and give finite logits?")
def runs(specimen: Specimen) -> Verdict:
    logits = specimen.logits
    if logits.shape[:2] != specimen.ids.shape:
        return Verdict(
            False, f"logits of shape {tuple(logits.shape)} for ids of {tuple(specimen.ids.shape)}"
        )
    return YES if logits.isfinite().all() else Verdict(False, "its logits are not finite")


@register(
    "foundation",
    "embeddings",
    "Are embeddings and hidden size found, and do they embed?",
    ("runs",),
)
def embeddings(specimen: Specimen) -> Verdict:
    table = find_embeddings(specimen.model)
    if table is None:
        return Verdict(False, "it has no module that embeds tokens")
    seen: list[Tensor] = []
    with table.register_forward_hook(lambda _, __, output: seen.append(output)):
        specimen.run()
    if not seen:
        return Verdict(False, "its embeddings are not called as a module")
    if _hidden_size(specimen) is None:
        return Verdict(False, "neither its config nor its layers tell its hidden size")
    vectors = seen[0].shape[:-1].numel()  # Reformer pads the prompt before it embeds it
    fits = vectors >= specimen.ids.numel()
    return YES if fits else Verdict(False, f"they give {tuple(seen[0].shape)}")


@register("foundation", "layers", "Are the layers found, and does each of them run?", ("runs",))
def layers(specimen: Specimen) -> Verdict:
    calls = _layer_calls(specimen)
    idle = [i for i in range(len(specimen.anatomy.layers)) if i not in calls]
    if not idle:
        return YES
    if all("another modality" in (specimen.anatomy.why_no_attention(i) or "") for i in idle):
        return Verdict(True, f"layers like {idle[0]} run only when there is an image")
    return Verdict(False, f"layers {idle} never run")


@register("foundation", "in order", "Does each layer run exactly once, in order?", ("layers",))
def in_order(specimen: Specimen) -> Verdict:
    calls = _layer_calls(specimen)
    if calls == sorted(set(calls)):
        return YES
    count = len(specimen.anatomy.layers)
    return Verdict(
        False, f"{count} layers make {len(calls)} calls: {', '.join(map(str, calls[:8]))}, ..."
    )


@register(
    "foundation", "attention", "Are the projections found that the heads leave by?", ("layers",)
)
def attention(specimen: Specimen) -> Verdict:
    found = _attentions(specimen)
    if not found:
        reasons = [
            specimen.anatomy.why_no_attention(i) for i in range(len(specimen.anatomy.layers))
        ]
        return Verdict(False, "; ".join(dict.fromkeys(reason for reason in reasons if reason)))
    widths: list[tuple[int, int]] = []
    hooks = [(a.output, _record_width(widths, a.heads * a.head_dim)) for a in found]
    specimen.run_hooked(*hooks)
    if not widths:
        return Verdict(False, "its attention outputs are not called as modules")
    wrong = [pair for pair in widths if pair[0] != pair[1]]
    return Verdict(False, f"an output takes {wrong[0][0]}, not {wrong[0][1]}") if wrong else YES


@register("foundation", "head gates", "Do gates at 1 on every head change no bit?", ("attention",))
def head_gates(specimen: Specimen) -> Verdict:
    hooks = [(a.output, scale_heads(a, torch.ones(a.heads))) for a in _attentions(specimen)]
    gated = specimen.run_hooked(*hooks)
    return (
        YES
        if torch.equal(gated, specimen.logits)
        else Verdict(False, "gates at 1 change the logits")
    )


@register(
    "foundation",
    "head removal",
    "Does a gate at 0 equal zeroing its slice of W_o?",
    ("head gates",),
)
def head_removal(specimen: Specimen) -> Verdict:
    chosen = _attentions(specimen)[-1]
    gates = torch.ones(chosen.heads)
    gates[1] = 0.0
    # Where depths share one weight (Zamba), zeroing it silences the head at all of them.
    sharing = [a for a in _attentions(specimen) if a.output.weight is chosen.output.weight]
    gated = specimen.run_hooked(*[(a.output, scale_heads(a, gates)) for a in sharing])
    with _zeroed(chosen, head=1):
        zeroed = specimen.run()
    if torch.equal(gated, specimen.logits):
        return Verdict(False, "the head has no effect on the logits")
    return YES if torch.equal(gated, zeroed) else Verdict(False, "the two differ")


@register(
    "foundation", "layer gates", "Does every layer take a lerp gate, neutral at 1?", ("layers",)
)
def layer_gates(specimen: Specimen) -> Verdict:
    run = _layer_calls(specimen)
    if not torch.equal(_with_layer_gates(specimen, dict.fromkeys(run, 1.0)), specimen.logits):
        return Verdict(False, "gates at 1 change the logits")
    skipped = _with_layer_gates(specimen, {run[-1]: 0.0})
    if torch.equal(skipped, specimen.logits):
        return Verdict(False, "a gate at 0 has no effect")
    return YES


@register(
    "foundation", "mlp", "Is the projection found that the MLP's channels leave by?", ("layers",)
)
def mlp(specimen: Specimen) -> Verdict:
    anatomy = specimen.anatomy
    found = [block for i in range(len(anatomy.layers)) for block in anatomy.mlps(i)]
    if not found:
        reasons = [anatomy.why_no_mlp(i) for i in range(len(anatomy.layers))]
        return Verdict(False, "; ".join(dict.fromkeys(reason for reason in reasons if reason)))
    widths: list[tuple[int, int]] = []
    specimen.run_hooked(*[(block.down, _record_width(widths, block.width)) for block in found])
    wrong = [pair for pair in widths if pair[0] != pair[1]]
    if wrong or not widths:
        return Verdict(False, f"a down projection takes {wrong[0][0]}" if wrong else "never called")
    return YES


@register(
    "foundation", "head", "Does the decoder, then the head, give the model's logits?", ("layers",)
)
@torch.no_grad()
def head(specimen: Specimen) -> Verdict:
    anatomy = specimen.anatomy
    if anatomy.head is None:
        return Verdict(False, "no projection to the vocabulary was found")
    hidden = anatomy.decoder(input_ids=specimen.ids, use_cache=False)
    hidden = getattr(hidden, "last_hidden_state", None)
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


@register(
    "foundation", "chosen logits", "Does it compute logits at chosen positions alone?", ("runs",)
)
def chosen_logits(specimen: Specimen) -> Verdict:
    positions = torch.tensor([1, 4, specimen.ids.shape[1] - 1])
    chosen = specimen.run(logits_to_keep=positions)
    if chosen.shape[1] != len(positions):
        return Verdict(False, "it takes no logits_to_keep")
    close = torch.allclose(chosen, specimen.logits[:, positions], atol=1e-5)
    return YES if close else Verdict(False, "they differ from the whole sequence's")


@register(
    "foundation",
    "first k",
    "Run alone, do the first layers give the model's own state?",
    ("layers",),
)
def first_layers(specimen: Specimen) -> Verdict:
    reason = specimen.depth.first_layers
    return YES if reason is None else Verdict(False, reason)


@register(
    "foundation", "resume", "Stopped half-way and resumed, does it give the same bits?", ("layers",)
)
def resume(specimen: Specimen) -> Verdict:
    reason = specimen.depth.resume
    return YES if reason is None else Verdict(False, reason)


def scale_heads(attention: Attention, gates: Tensor) -> Callable[..., Any]:
    """A pre-hook that multiplies each head's slice of the output projection's input."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        return (x * gates.to(x).repeat_interleave(attention.head_dim), *inputs[1:])

    return hook


@contextmanager
def _zeroed(attention: Attention, head: int) -> Iterator[None]:
    """The head's slice of W_o at zero, and afterwards as it was."""
    weight: Tensor = attention.output.weight.data  # type: ignore[assignment]
    columns = weight.narrow(attention.axis, head * attention.head_dim, attention.head_dim)
    saved = columns.clone()
    try:
        columns.zero_()
        yield
    finally:
        columns.copy_(saved)


def _with_layer_gates(specimen: Specimen, gates: dict[int, float]) -> Tensor:
    with ExitStack() as stack:
        for index, gate in gates.items():
            layer = specimen.anatomy.layers[index]
            stack.enter_context(layer.register_forward_hook(_layer_gate(gate), with_kwargs=True))
        return specimen.run()


def _layer_gate(gate: float) -> Callable[..., Any]:
    """A hook that leaves `gate` of what a layer does; x + gate * (y - x) is not exact at 1."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        y = output if isinstance(output, Tensor) else output[0]
        mixed = torch.lerp(x, y, torch.tensor(gate, dtype=x.dtype))
        if isinstance(output, Tensor):
            return mixed
        rest = (mixed, *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else rest

    return hook


def _attentions(specimen: Specimen) -> list[Attention]:
    anatomy = specimen.anatomy
    return [block for i in range(len(anatomy.layers)) for block in anatomy.attentions(i)]


def _hidden_size(specimen: Specimen) -> int | None:
    """Anatomy's, or the config's alone where the layers are not found."""
    try:
        return specimen.anatomy.hidden_size
    except UnsupportedModel:
        size = read(text_config(specimen.model), "hidden_size")
        return size if isinstance(size, int) else None


def _layer_calls(specimen: Specimen) -> list[int]:
    """Which layers one forward runs, in order."""
    calls: list[int] = []

    def record(index: int) -> Callable[..., None]:
        return lambda *_: calls.append(index)

    specimen.run_hooked(*[(layer, record(i)) for i, layer in enumerate(specimen.anatomy.layers)])
    return calls


def _record_width(seen: list[tuple[int, int]], expected: int) -> Callable[..., None]:
    return lambda _, inputs: seen.append((inputs[0].shape[-1], expected))


def _compare_logits(ours: Tensor, theirs: Tensor) -> Verdict:
    """Equal; or a constant away (Granite scales its logits), or more (Gemma 2 caps them)."""
    if torch.allclose(ours, theirs, atol=1e-5):
        return YES
    factor = ((ours * theirs).sum() / (ours * ours).sum()).item()
    if torch.allclose(factor * ours, theirs, atol=1e-5):
        return Verdict(False, f"the model scales its logits by {factor:.4g} after the head")
    same_order = torch.equal(ours.argsort(-1), theirs.argsort(-1))
    if same_order:
        return Verdict(False, "the model caps its logits after the head")
    return Verdict(False, "more than the head lies between its hidden states and its logits")
