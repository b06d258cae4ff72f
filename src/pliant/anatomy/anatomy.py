"""The parts of a causal LM: one description for all of Pliant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from torch import nn

from pliant.anatomy import find
from pliant.anatomy.blocks import (
    Absent,
    Attention,
    Mixture,
    Mlp,
    find_attention,
    find_mixtures,
    find_mlp,
)
from pliant.anatomy.config import layer_configs, layer_types, text_config
from pliant.anatomy.find import unwrap
from pliant.anatomy.recurrent import Recurrent, find_linear_attention, find_recurrent
from pliant.anatomy.slices import Slices, find_expert_channels, find_sliced_heads
from pliant.errors import UnsupportedModel


class Anatomy:
    """A model's parts, identified by structure; create it with `Anatomy.of(model)`.

    It refers to the model's own modules, copies nothing and changes nothing. It also works on a
    model without weights (on the meta device).
    """

    model: nn.Module
    """The causal LM itself, unwrapped (DistributedDataParallel, FSDP, torch.compile, PEFT, ...)."""
    decoder: nn.Module
    """The smallest model that turns ids into hidden states; a multimodal model's text decoder."""
    layers: Sequence[nn.Module]
    """The residual blocks, in order."""
    embeddings: nn.Module
    norm: nn.Module | None
    """The norm after the last layer; None for models without one (post-norm models)."""
    head: nn.Module | None
    """The module that turns the last hidden state into logits: nearly always one projection."""
    hidden_size: int
    """The width of the residual stream."""

    def __init__(self, model: nn.Module, named: dict[str, str | None], heads: int | None = None):
        self.model = unwrap(model)
        self.config = text_config(self.model)
        self._attention_output = named.get("attention_output")
        self._mlp_down = named.get("mlp_down")
        self._heads = heads
        self.embeddings = self._part("embeddings", named) or self._find_embeddings()
        path = named.get("layers")
        self.layers = self._stack(path) if path else find.find_layers(self.model)
        self.decoder = self._part("decoder", named) or find.find_decoder(
            self.model, self.embeddings, self.layers
        )
        self.hidden_size = find.find_hidden_size(self.config, self.layers)
        self.norm = self._part("norm", named) or find.find_norm(
            self.decoder, self.layers, self.hidden_size
        )
        self.head = self._part("head", named) or find.find_head(self.model, self.decoder)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        layers: str | None = None,
        attention_output: str | None = None,
        mlp_down: str | None = None,
        embeddings: str | None = None,
        norm: str | None = None,
        head: str | None = None,
        decoder: str | None = None,
        heads: int | None = None,
    ) -> Anatomy:
        """Find the parts of `model`, except those that you name.

        `layers`, `embeddings`, `norm`, `head` and `decoder` are paths in the model;
        `attention_output` and `mlp_down` are paths in a layer, or the ends of such paths; `heads`
        is the number of heads, if neither the model nor its config contains it.
        """
        named = {
            "layers": layers,
            "attention_output": attention_output,
            "mlp_down": mlp_down,
            "embeddings": embeddings,
            "norm": norm,
            "head": head,
            "decoder": decoder,
        }
        anatomy = cls(model, named, heads)
        anatomy._check_names()
        return anatomy

    def __str__(self) -> str:
        """One line: the sizes of what Pliant can read, gate and train."""
        indices = range(len(self.layers))
        rows = getattr(self.embeddings, "num_embeddings", None)
        parts = [
            f"{len(self.layers)} layers of width {self.hidden_size}",
            _sizes("heads", [a.heads for i in indices for a in self.attentions(i)]),
            _sizes("KV heads", [a.kv_heads for i in indices for a in self.attentions(i)]),
            _sizes("channels", [m.width for i in indices for m in self.mlps(i)]),
            _sizes("experts", [m.count for i in indices for m in self.mixtures(i)]),
            f"a vocabulary of {rows:,}" if rows else "",
            f"{sum(p.numel() for p in self._own_parameters()):,} parameters",
        ]
        return f"{type(self.model).__name__}: {', '.join(part for part in parts if part)}"

    def _own_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the model, without what is attached to it."""
        attached = {id(p) for p in getattr(self.model, "pliant", nn.Module()).parameters()}
        return (p for p in self.model.parameters() if id(p) not in attached)

    def attention(self, index: int) -> Attention | None:
        """The attention of layer `index`, or None; `why_no_attention(index)` is the reason.

        For a layer with several (LongCat-Flash) this is the first; `attentions` has them all.
        """
        return next(iter(self.attentions(index)), None)

    def attentions(self, index: int) -> tuple[Attention, ...]:
        """Every attention block of layer `index`."""
        blocks = self._attention[index]
        return () if isinstance(blocks, Absent) else blocks

    def why_no_attention(self, index: int) -> str | None:
        """Why layer `index` has no attention; None if it has one."""
        blocks = self._attention[index]
        return blocks.reason if isinstance(blocks, Absent) else None

    def mlp(self, index: int) -> Mlp | None:
        """The dense MLP of layer `index`, or None; `why_no_mlp(index)` is the reason."""
        return next(iter(self.mlps(index)), None)

    def mlps(self, index: int) -> tuple[Mlp, ...]:
        """Every dense MLP of layer `index`."""
        blocks = self._mlp[index]
        return () if isinstance(blocks, Absent) else blocks

    def why_no_mlp(self, index: int) -> str | None:
        """Why layer `index` has no dense MLP; None if it has one."""
        blocks = self._mlp[index]
        return blocks.reason if isinstance(blocks, Absent) else None

    def mixtures(self, index: int) -> tuple[Mixture, ...]:
        """Every mixture of experts of layer `index`."""
        blocks = self._mixture[index]
        return () if isinstance(blocks, Absent) else blocks

    def why_no_mixture(self, index: int) -> str | None:
        """Why layer `index` has no mixture of experts; None if it has one."""
        blocks = self._mixture[index]
        return blocks.reason if isinstance(blocks, Absent) else None

    def sliced_heads(self, index: int) -> tuple[Slices, ...]:
        """The heads of layer `index` that end in no projection of all heads; see `Slices`."""
        return _present(self._sliced_heads[index])

    def expert_channels(self, index: int) -> tuple[Slices, ...]:
        """The channels of the experts of layer `index`."""
        return _present(self._expert_channels[index])

    def why_no_expert_channels(self, index: int) -> str | None:
        """Why the experts of layer `index` have no channels; None if they have."""
        return _reason(self._expert_channels[index])

    def recurrent(self, index: int) -> tuple[Recurrent, ...]:
        """The recurrent mixers of layer `index`: state spaces, linear attention, RWKV."""
        return _present(self._recurrent[index])

    def why_no_recurrent(self, index: int) -> str | None:
        """Why layer `index` has no recurrent mixer; None if it has one."""
        return _reason(self._recurrent[index])

    @cached_property
    def _sliced_heads(self) -> list[tuple[Slices, ...] | Absent]:
        configs = layer_configs(self.config, len(self.layers))
        return [
            Absent("its heads end in a projection")
            if self.attentions(index)
            else find_sliced_heads(layer, self.hidden_size, configs[index])
            for index, layer in enumerate(self.layers)
        ]

    @cached_property
    def _expert_channels(self) -> list[tuple[Slices, ...] | Absent]:
        return [find_expert_channels(layer, self.hidden_size) for layer in self.layers]

    @cached_property
    def _recurrent(self) -> list[tuple[Recurrent, ...] | Absent]:
        count = len(self.layers)
        configs, types = layer_configs(self.config, count), layer_types(self.config, count)
        return [
            find_recurrent(layer, config, find_linear_attention(layer, config, kind))
            for layer, config, kind in zip(self.layers, configs, types, strict=True)
        ]

    @cached_property
    def _mixture(self) -> list[tuple[Mixture, ...] | Absent]:
        return [find_mixtures(layer) for layer in self.layers]

    @cached_property
    def _attention(self) -> list[tuple[Attention, ...] | Absent]:
        count = len(self.layers)
        configs, types = layer_configs(self.config, count), layer_types(self.config, count)
        return [
            find_attention(layer, config, kind, self._attention_output, self._heads)
            for layer, config, kind in zip(self.layers, configs, types, strict=True)
        ]

    @cached_property
    def _mlp(self) -> list[tuple[Mlp, ...] | Absent]:
        return [
            find_mlp(
                layer,
                self.hidden_size,
                tuple(attention.output_name for attention in self.attentions(index)),
                self._mlp_down,
            )
            for index, layer in enumerate(self.layers)
        ]

    def _find_embeddings(self) -> nn.Module:
        embeddings = find.find_embeddings(self.model)
        if embeddings is None:
            raise UnsupportedModel(
                f"{type(self.model).__name__} has no embeddings (looked at get_input_embeddings() "
                f'and for an nn.Embedding). Name them: Anatomy.of(model, embeddings="model.embed").'
            )
        return embeddings

    def _part(self, what: str, named: dict[str, str | None]) -> nn.Module | None:
        path = named.get(what)
        return self._module(what, path) if path is not None else None

    def _stack(self, path: str) -> list[nn.Module]:
        stack: Any = self._module("layers", path)
        layers = list(stack.children())
        if not layers:
            raise UnsupportedModel(
                f"layers={path!r} names a {type(stack).__name__} without children."
            )
        return layers

    def _module(self, what: str, path: str) -> nn.Module:
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            top = ", ".join(name for name, _ in self.model.named_children())
            raise UnsupportedModel(
                f"{what}={path!r} names nothing in {type(self.model).__name__}; it holds {top}."
            ) from None

    def _check_names(self) -> None:
        """Raise UnsupportedModel for a name that matches no layer at all."""
        every = range(len(self.layers))
        for what, name, why in (
            ("attention_output", self._attention_output, self.why_no_attention),
            ("mlp_down", self._mlp_down, self.why_no_mlp),
        ):
            if name is not None and all(why(index) for index in every):
                kind = type(self.model).__name__
                raise UnsupportedModel(f"{what}={name!r} fits no layer of {kind}: {why(0)}.")


def _present(blocks: tuple[Any, ...] | Absent) -> tuple[Any, ...]:
    return () if isinstance(blocks, Absent) else blocks


def _reason(blocks: tuple[Any, ...] | Absent) -> str | None:
    return blocks.reason if isinstance(blocks, Absent) else None


def _sizes(what: str, sizes: list[int]) -> str:
    """Of the blocks that have any: one number, or the smallest and the largest."""
    if not sizes:
        return ""
    low, high = min(sizes), max(sizes)
    return f"{low:,} {what}" if low == high else f"{low:,} to {high:,} {what}"
