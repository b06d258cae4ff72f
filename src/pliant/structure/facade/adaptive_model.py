"""AdaptiveModel: a model with a gate for each attention head, read and written block by block.

    baseline_model = load_baseline_model("facebook/opt-125m", device)
    adaptive_model = load_adaptive_model("facebook/opt-125m", baseline_model, device)
    with torch.no_grad():
        adaptive_model.blocks[2]["attn"].gate[5] = 0.001
    adaptive_model.generate(...)

A facade: `pliant.structure.attach` does the work, on `adaptive_model.model`, which is the baseline
model itself and no copy. The same code works on every architecture with attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pliant import loading
from pliant.adapters import attached
from pliant.errors import AdapterError, UnsupportedModel
from pliant.structure.gates import Gates, attach
from pliant.structure.units import modules_with_heads


def load_baseline_model(
    model_name: str | Path, device: str | torch.device | None = None, **options: Any
) -> PreTrainedModel:
    """The model as it is, in eval mode; `options` are those of `pliant.load`."""
    return loading.load_model(model_name, device=device, **options)


def load_adaptive_model(
    model_name: str | Path,
    baseline_model: nn.Module,
    device: str | torch.device | None = None,
) -> AdaptiveModel:
    """Attach gates, all at 1, to every head of the baseline model, and move it to `device`.

    The seed chose a loader by `model_name`; here the model's own structure says where its heads
    are, so the name changes nothing. `baseline_model` has the gates as well, for it is not copied:
    `adaptive_model.gates.disabled()` runs it without them.
    """
    place = loading.torch_device(device)
    if place is not None and any(p.device != place for p in baseline_model.parameters()):
        baseline_model.to(place)
    return AdaptiveModel(baseline_model)


class AdaptiveModel(nn.Module):
    """Runs the model with its gates; `blocks[l]["attn"].gate[h]` is the gate of one head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, adapter in attached(model).items():
            if isinstance(adapter, Gates) and "heads" in adapter.config.units:
                raise AdapterError(
                    f"the model has gates on its heads already (attached as {name}): detach them "
                    "with adaptive_model.detach(), or go on with the AdaptiveModel that it has"
                )
        gates = attach(model)
        self.blocks = tuple(_blocks(gates))
        """For each layer with attention a dictionary with it under "attn". Layers without are
        left out, so that loops run on hybrids; `blocks[n].layer` is the layer's number."""
        self.model = model
        self.gates = gates
        """The adapter: save it, disable it, detach it."""

    def forward(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The model's own output."""
        return self.model(input_ids, *args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`, with its cache."""
        generate: Callable[..., Any] = self.model.generate  # type: ignore[assignment]
        return generate(*args, **kwargs)

    def detach(self) -> nn.Module:
        """Take the gates off; returns the model as it was before. The gates keep their values."""
        self.gates.detach()
        return self.model

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The attached gates are part of the model, which moves them and leaves their dtype as it
        # is; here they are registered for `state_dict` alone.
        self.model._apply(fn, recurse)
        return self


@dataclass(eq=False)
class GatedAttention:
    """The heads of one attention block."""

    gates: Gates = field(repr=False)
    layer: int
    block: int
    num_heads: int

    @property
    def gate(self) -> nn.Parameter:
        """(num_heads,): write it in place, under `torch.no_grad()`."""
        return self.gates["heads", self.layer, self.block]

    @gate.setter
    @torch.no_grad()
    def gate(self, value: Tensor) -> None:
        """Copies the values: the parameter stays that of an optimizer (`gate *= 0.5`)."""
        if value is not self.gate:
            self.gate.copy_(value)


class Block(dict[str, GatedAttention]):
    """The parts of one layer that have gates."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def __missing__(self, name: str) -> GatedAttention:
        raise UnsupportedModel(
            f"layer {self.layer} has no {name!r} to gate, only {', '.join(self)}"
        )


def _blocks(gates: Gates) -> Iterator[Block]:
    """One for each layer with attention. Layers that share a block of it (Zamba) share its gate."""
    sites = {id(site.module): site for site in gates.sites}
    for layer in range(len(gates.anatomy.layers)):
        block = Block(layer)
        for j, module in enumerate(modules_with_heads(gates.anatomy, layer)):
            site = sites[id(module)]
            name = f"attn_{j}" if j else "attn"
            block[name] = GatedAttention(gates, site.layer, site.block, site.count)
        if block:
            yield block
