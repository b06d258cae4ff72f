"""Finds a causal LM inside its wrappers, and its parts by shape and position, never by its type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from pliant.anatomy.blocks import as_projection, projections
from pliant.anatomy.config import read
from pliant.errors import UnsupportedModel


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside PEFT, torch.compile, DDP, FSDP and DeepSpeed, however they are nested."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    """The model inside the outermost wrapper; None if there is no wrapper."""
    for name in ("_orig_mod", "_fsdp_wrapped_module"):  # torch.compile, FSDP version 1
        if isinstance(inner := model._modules.get(name), nn.Module):
            return inner
    if callable(get_base_model := getattr(model, "get_base_model", None)):  # PEFT
        return get_base_model()
    children = model._modules
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or (
        list(children) == ["module"]  # DeepSpeed's engine, and wrappers like it
    ):
        return children["module"]
    return None


def find_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that turns token ids into vectors."""
    if (embeddings := _call_getter(model, "get_input_embeddings")) is not None:
        return embeddings
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    return max(tables, key=lambda table: table.num_embeddings, default=None)


def find_head(model: nn.Module, decoder: nn.Module) -> nn.Module | None:
    """The module that turns the last hidden state into logits: a projection, or BERT's network."""
    projection = _call_getter(model, "get_output_embeddings")
    if projection is None:
        inside = {id(m) for m in decoder.modules()}
        outside = [p for p in projections(model) if id(p.module) not in inside]
        widest = max(outside, key=lambda p: p.outputs, default=None)
        return widest.module if widest is not None else None
    # BERT's projection is the last step of the head `cls`, a sibling of the decoder.
    siblings = [child for child in model.children() if path_of(child, decoder) is None]
    head = next((child for child in siblings if path_of(child, projection) is not None), None)
    return head or projection


def find_layers(model: nn.Module) -> list[nn.Module]:
    """The stack of layers that the hidden state runs through.

    Of all stacks in the text decoder it is the highest in the module tree (an image processor is
    deeper), then the one with the most parameters (BLT has small local stacks around its global
    one). Stacks of equal size are one stack in several pieces (HRM runs two in turn).
    """
    stacks = dict(_stacks(_text_decoder(model)))
    if not stacks:
        raise UnsupportedModel(
            f"{type(model).__name__} has no stack of layers (looked for a ModuleList of blocks "
            f"that hold projections and norms). Name it by hand: "
            f'Anatomy.of(model, layers="backbone.blocks").'
        )
    depth = {path: path.count(".") for path in stacks}
    shallowest = [path for path in stacks if depth[path] == min(depth.values())]
    weight = {path: sum(p.numel() for p in stacks[path].parameters()) for path in shallowest}
    heaviest = [path for path in shallowest if weight[path] == max(weight.values())]
    return [layer for path in heaviest for layer in stacks[path]]


def _text_decoder(model: nn.Module) -> nn.Module:
    """The result of `get_decoder`, if that is a model (ModernBERT's is its head)."""
    named = _call_getter(model, "get_decoder")
    return named if named is not None and hasattr(named, "config") else model


def _call_getter(model: Any, getter: str) -> nn.Module | None:
    """The module that the model's own getter returns; None if it has no such getter or module."""
    try:
        module = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return module if isinstance(module, nn.Module) else None


def find_decoder(
    model: nn.Module, embeddings: nn.Module | None, layers: Sequence[nn.Module]
) -> nn.Module:
    """The smallest model that holds the embeddings and all layers."""
    wanted = {id(m) for m in [embeddings, *layers] if m is not None}
    holders = [
        m
        for m in model.modules()
        if hasattr(m, "config") and wanted <= {id(inner) for inner in m.modules()}
    ]
    # modules() yields outer modules first, so the last holder is the smallest.
    return holders[-1] if holders else model


def find_norm(
    decoder: nn.Module, layers: Sequence[nn.Module], hidden_size: int
) -> nn.Module | None:
    """The norm after the last layer: the last norm registered beside the stack, or above it."""
    stack = path_of(decoder, layers[-1]) or ""
    parents = [".".join(stack.split(".")[:n]) for n in range(stack.count(".") + 1)]
    norms = [
        (name, child)
        for parent in parents
        for name, child in decoder.get_submodule(parent).named_children()
        if _is_norm(name, child)
        # As wide as the hidden state or a multiple (Reformer); OLMo's has no weight.
        and all(p.numel() % hidden_size == 0 for p in child.parameters())
    ]
    # A LayerNorm with `emb` in its name follows the embeddings. Models with RMS norms are pre-norm
    # and end in a norm, whatever its name (LFM2 calls it embedding_norm).
    final = [m for name, m in norms if "emb" not in name or not isinstance(m, nn.LayerNorm)]
    return final[-1] if final else None


def find_hidden_size(config: Any, layers: Sequence[nn.Module]) -> int:
    """The width of the residual stream: the config's, if projections of the layers share it."""
    ends = [(p.inputs, p.outputs) for layer in layers for p in projections(layer)]
    size = read(config, "hidden_size")
    if isinstance(size, int) and (not ends or any(size in pair for pair in ends)):
        return size
    # Else the most frequent number of inputs or outputs.
    sizes = [size for pair in ends for size in pair]
    if not sizes:
        raise UnsupportedModel("no layer has a projection, so the hidden size is unknown.")
    return max(dict.fromkeys(sizes), key=sizes.count)


def device_of(module: nn.Module) -> torch.device:
    """The device that a module runs on, even while accelerate keeps its weights elsewhere."""
    execution_device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if execution_device is not None:
        return torch.device(execution_device)
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def path_of(root: nn.Module, inner: nn.Module) -> str | None:
    """The first path of `inner` in `root`; None if it is not in there."""
    return next((path for path, module in root.named_modules() if module is inner), None)


def _stacks(root: nn.Module, path: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Every outermost ModuleList of blocks: a list of bare projections or norms is no stack."""
    for name, child in root.named_children():
        child_path = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            if len(child) and all(_is_block(element) for element in child):
                yield child_path, child
        else:
            yield from _stacks(child, child_path)


def _is_block(module: nn.Module) -> bool:
    """A layer has projections, of a mixer or an MLP, and a norm."""
    if as_projection(module) is not None or next(iter(projections(module)), None) is None:
        return False
    return any(_is_norm(path, inner) for path, inner in module.named_modules())


def _is_norm(path: str, module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and next(module.children(), None) is None
