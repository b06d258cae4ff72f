"""U-Net skips: a layer of the second half adds to its output that of its mirror in the first half.

    skips = attach(model)               # layer i >= L / 2 takes from layer L - 1 - i
    ...                                 # train: skips[5] is the scale of layer 5's skip
    skips.save_pretrained("skips")

A skip is h += s * h_encoder, with one s for each channel, or h += s * Linear([h; h_encoder]). With
s = 0, as attached, it changes no bit. No stock checkpoint has a place for skips: a model that was
trained with them needs Pliant to run.

An encoder layer's output is held from that layer to the one that takes it, inside one forward of
one thread. Where a layer runs again in the backward pass (gradient checkpointing), the output that
it took is found again by the layer's input.

Refused: a pair of layers that run on different positions (selective training then takes its engine
"exact" instead of "sparse"), and reentrant checkpointing around a layer's hooks, which would lose
the skip's gradient.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from pliant import adapters
from pliant.adapters import Adapter, After, Around, Wire
from pliant.adapters.quantized import differentiable
from pliant.anatomy import Anatomy
from pliant.anatomy.find import device_of
from pliant.errors import (
    AdapterError,
    InvalidInput,
    UnsupportedModel,
    check_choice,
    check_whole,
    did_you_mean,
    named_settings,
)
from pliant.structure.gates import with_first

Fusion = Literal["scale", "linear"]


@named_settings
@dataclass(frozen=True)
class SkipConfig:
    """What a decoder layer does with the output that it takes."""

    fusion: Fusion = "scale"
    """"scale": h += s * h_encoder. "linear": h += s * Linear([h; h_encoder]), which has 2 D^2
    weights in each pair of layers. Either way s has one number for each channel, 0 at first."""
    seed: int = 0
    """Of the initial weights of "linear"."""

    def __post_init__(self) -> None:
        check_choice("fusion", self.fusion, get_args(Fusion))
        check_whole("seed", self.seed, 0)


def attach(model: nn.Module, config: SkipConfig | None = None, name: str | None = None) -> Skips:
    """New skips on `model`, all at 0, under the name "skips"."""
    return adapters.attach(model, Skips(model, config or SkipConfig()), name)


class Skips(Adapter):
    """Skips between the layers of a model; `skips[layer]` is a scale to read, write or train."""

    part = "structure"
    default_name = "skips"
    config_class = SkipConfig
    why_no_export = (
        "U-Net skips have no place in a stock checkpoint: no architecture of transformers adds one "
        "layer's output to another's. Save them with skips.save_pretrained(folder) and run the "
        "model with Pliant, or call skips.detach() to export it without them"
    )

    def __init__(self, model: nn.Module, config: SkipConfig) -> None:
        super().__init__(model, config)
        anatomy = Anatomy.of(model)
        self.pairs = pairs_of(anatomy)
        generator = torch.Generator().manual_seed(config.seed)
        self.skips = nn.ModuleDict()
        for i in self.pairs:
            skip = Skip(anatomy.hidden_size, config.fusion == "linear", generator)
            self.skips[str(i)] = skip.to(device_of(anatomy.layers[i]))
        self._running = Running()
        self._taken = Taken()

    def __getitem__(self, layer: int) -> nn.Parameter:
        """The scale of the skip into this layer, with one number for each channel."""
        if layer not in self.pairs:
            raise InvalidInput(f"no skip ends in layer {layer}{did_you_mean(layer, self.pairs)}")
        return self.skips[str(layer)].scale  # type: ignore[return-value]

    # --- in the model's forward ----------------------------------------------------------------

    def wire(self, model: nn.Module) -> Iterator[Wire]:
        yield from differentiable(model)
        yield Around(self.anatomy.decoder, self._run_decoder)
        for i, source in self.pairs.items():
            yield After(self.anatomy.layers[source], partial(self._hold, source))
            yield After(self.anatomy.layers[i], partial(self._add, i))

    def _run_decoder(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        last = kwargs.get("logits_to_keep")
        outer = self._running.forward
        self._running.forward = ForwardPass(torch.is_grad_enabled(), last)
        try:
            return forward(*args, **kwargs)
        finally:
            self._running.forward = outer

    def _hold(self, source: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._running.forward is not None:
            self._running.forward.held[source] = _hidden(output)

    def _add(self, i: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        before, h = args[0] if args else kwargs["hidden_states"], _hidden(output)
        encoder = self._take(i, before, h)
        if encoder is None:
            return None
        return with_first(output, self.skips[str(i)](h, encoder.to(h)))

    def _take(self, i: int, before: Tensor, h: Tensor) -> Tensor | None:
        """The output that layer i takes; None if the model did not run the layer that gives it."""
        forward = self._running.forward
        if forward is None:
            return self._taken.again(i, before, self.pairs[i])
        if forward.grad and not torch.is_grad_enabled():
            raise AdapterError(
                f"layer {i} runs without gradient inside a forward with gradient, so its skip "
                "would not be trained. If this is gradient checkpointing, pass "
                'gradient_checkpointing_kwargs={"use_reentrant": False}; a model with reversible '
                "layers runs with skips under torch.no_grad() alone"
            )
        encoder = forward.held.pop(self.pairs[i], None)
        if encoder is not None:
            encoder = self._same_positions(i, h, encoder, forward.last)
        if forward.grad and not torch.compiler.is_compiling():
            self._taken.note(i, before, encoder)
        return encoder

    def _same_positions(self, i: int, h: Tensor, encoder: Tensor, last: Any) -> Tensor:
        """The encoder's output at the positions of `h`."""
        if isinstance(last, int) and h.shape[-2] == last < encoder.shape[-2]:
            # Layers of Gemma 4 that share keys run on the positions whose logits are kept.
            encoder = encoder[..., -last:, :]
        if h.shape == encoder.shape:
            return encoder
        raise UnsupportedModel(
            f"layer {i} of {type(self.base).__name__} has an output of shape {list(h.shape)}, and "
            f"layer {self.pairs[i]}, which its skip takes from, one of {list(encoder.shape)}: both "
            "layers must run on the same positions"
        )


class Skip(nn.Module):
    """h + s * h_encoder, or h + s * Linear([h; h_encoder])."""

    def __init__(self, width: int, linear: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.width = width
        self.scale = nn.Parameter(torch.zeros(width))
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if linear:
            bound = (2 * width) ** -0.5  # that of nn.Linear, which draws from the global generator
            self.weight = nn.Parameter(torch.empty(width, 2 * width))
            self.bias = nn.Parameter(torch.empty(width))
            for parameter in (self.weight, self.bias):
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, h_BTD: Tensor, encoder_BTD: Tensor) -> Tensor:
        dtype = h_BTD.dtype
        if h_BTD.shape[-1] != self.width:  # Qwen 4's layers have several streams side by side
            streams = [h.unflatten(-1, (-1, self.width)) for h in (h_BTD, encoder_BTD)]
            return self(*streams).flatten(-2)
        if self.weight is not None and self.bias is not None:
            both = torch.cat([h_BTD, encoder_BTD], dim=-1)
            encoder_BTD = F.linear(both, self.weight.to(dtype), self.bias.to(dtype))
        return h_BTD + self.scale.to(dtype) * encoder_BTD


def pairs_of(anatomy: Anatomy) -> dict[int, int]:
    """Each layer i >= L / 2 with the layer L - 1 - i that it takes from; a middle one has none."""
    layers, kind = list(anatomy.layers), type(anatomy.model).__name__
    depth = len(layers)
    if len({id(layer) for layer in layers}) < depth:
        raise UnsupportedModel(f"{kind} uses one layer several times: skips need different ones")
    pairs = {i: depth - 1 - i for i in range((depth + 1) // 2, depth)}
    if not pairs:
        raise UnsupportedModel(f"{kind} has {depth} layer: a skip needs two")
    return pairs


# --- what is held, and for how long --------------------------------------------------------------


@dataclass
class ForwardPass:
    """One forward of the decoder: the outputs that no layer has taken yet."""

    grad: bool
    last: Any
    """How many of the last positions have logits, if the caller says so."""
    held: dict[int, Tensor] = field(default_factory=dict)


class Running(threading.local):
    """The forward that runs in this thread. A copy of the model starts without one."""

    def __init__(self) -> None:
        self.forward: ForwardPass | None = None

    def __reduce__(self) -> Any:
        return Running, ()


SAME = torch.empty(0)
"""Stands for the layer's own input."""


class Taken:
    """What each layer took, by the layer's input, for as long as this input lives.

    A checkpointed layer runs again in the backward pass, perhaps in another thread, when the
    forward is over; its input is then the same tensor. What is noted lives no longer than the
    graph, which holds both.
    """

    def __init__(self) -> None:
        self.by_input: MutableMapping[Tensor, dict[int, Tensor | None]] = WeakTensorKeyDictionary()

    def note(self, i: int, before: Tensor, encoder: Tensor | None) -> None:
        taken = self.by_input.setdefault(before, {})
        # A key that is its own value would never die.
        taken[i] = SAME if encoder is before else encoder

    def again(self, i: int, before: Tensor, source: int) -> Tensor | None:
        taken = self.by_input.get(before, {})
        if i not in taken:
            raise AdapterError(
                f"layer {i} runs outside its model's forward, where the output of layer {source}, "
                "which its skip takes, is unknown: run the whole model, or the layer under "
                "skips.disabled()"
            )
        encoder = taken[i]
        return before if encoder is SAME else encoder

    def __reduce__(self) -> Any:
        return Taken, ()


def _hidden(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
