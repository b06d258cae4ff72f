"""Everything at the [CPX] positions: the rows, their LoRA, and the scorer active in this thread.

A scorer's hooks stay on its model but act only inside an `activated` block.

Shapes: B prompts, T positions, r rows, D features.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.anatomy import Anatomy
from pliant.anatomy.blocks import Projection, as_projection, projections
from pliant.complexity.config import Aggregation, CPXConfig
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.prefill import Batch, device_of, on_top

MODELS = "transformers.models."
SAMPLE = 2_048
"""How many embeddings the mean and spread are estimated from."""


@torch.no_grad()
def rows_like_embeddings(anatomy: Anatomy, count: int, seed: int = 0) -> Tensor:
    """The mean embedding, and noise of the embeddings' own spread that tells the rows apart.

    Calls the embedding module instead of reading its weight: some scale what they look up. A row
    unlike every embedding (zeros, or noise of another size) would be out of distribution.
    """
    sample = anatomy.embeddings(_sample(anatomy)).float()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, sample.shape[-1], generator=generator).to(sample.device)
    return sample.mean(dim=0) + sample.std(dim=0) * noise


def width_read(anatomy: Anatomy) -> int:
    """The width of the decoder's output, which OPT-350m, for one, narrows after its last layer.

    Where the model's own head takes another width than the hidden size, two tokens are run.
    """
    projection = None if anatomy.head is None else as_projection(anatomy.head)
    if projection is None or projection.inputs == anatomy.hidden_size:
        return anatomy.hidden_size
    ids = _sample(anatomy)[:2].unsqueeze(0)
    with torch.no_grad():
        return on_top(anatomy, Batch(ids[:, :1], torch.ones_like(ids[:, :1])), ids[:, 1:]).shape[-1]


def _sample(anatomy: Anatomy) -> Tensor:
    table = getattr(anatomy.embeddings, "num_embeddings", 2)
    size = int(getattr(anatomy.config, "vocab_size", 0) or table)
    step = max(1, size // SAMPLE)
    return torch.arange(0, size, step, device=device_of(anatomy.embeddings))


def pooled(hidden_BrD: Tensor, how: Aggregation, query_D: Tensor | None = None) -> Tensor:
    """One vector for each prompt, (B, D)."""
    if how == "mean":
        return hidden_BrD.mean(dim=1)
    if how == "max":
        return hidden_BrD.amax(dim=1)
    if how == "attention":
        assert query_D is not None
        weights_Br = (hidden_BrD @ query_D / math.sqrt(len(query_D))).softmax(dim=1)
        return (weights_Br.unsqueeze(-1) * hidden_BrD).sum(dim=1)
    return hidden_BrD[:, -1]


# --- LoRA at these positions only, so that keys and values of the prompt never depend on it -------


class Lora(nn.Module):
    """x -> scale * B A x in fp32; initially zero, because B starts at zero."""

    def __init__(self, projection: Projection, rank: int, scale: float, seed: int) -> None:
        super().__init__()
        self.scale = scale
        place = device_of(projection.module)
        generator = torch.Generator().manual_seed(seed)
        a = torch.rand(rank, projection.inputs, generator=generator) * 2 - 1
        self.a = nn.Parameter((a / math.sqrt(projection.inputs)).to(place))
        self.b = nn.Parameter(torch.zeros(projection.outputs, rank, device=place))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return self._change(x)
        with torch.autocast(device_type=x.device.type, enabled=False):
            return self._change(x)

    def _change(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x.to(self.a.dtype), self.a) * self.scale, self.b)


def targets(anatomy: Anatomy, config: CPXConfig) -> Iterator[tuple[str, Projection]]:
    """The projections that take a LoRA, each with its key."""
    depth = len(anatomy.layers) if config.layer is None else config.layer
    chosen = False
    for index, layer in enumerate(list(anatomy.layers)[:depth]):
        for projection in projections(layer):
            if _is_target(projection, config.lora_targets):
                chosen = True
                yield f"{index}_{projection.path.replace('.', '_')}", projection
    if not chosen:
        names = sorted({p.names[0] for layer in anatomy.layers for p in projections(layer)})
        raise InvalidInput(
            f"lora_targets = {config.lora_targets!r} names no projection of the layers: "
            f"there are {', '.join(names) or 'none'}"
        )


def _is_target(projection: Projection, ends: tuple[str, ...]) -> bool:
    if ends:
        return any(f".{projection.path}".endswith(f".{end}") for end in ends)
    # A numbered module in a layer is one expert of many.
    numbered = any(part.isdigit() for part in projection.path.split("."))
    return not numbered and _maps_features(projection)


@torch.no_grad()
def _maps_features(projection: Projection) -> bool:
    """Whether a model's own kind of projection maps features to features: Falcon's does, but
    DeepSeek-V4's works in groups, and Llama 4's router returns a pair."""
    module = projection.module
    weight = next(module.parameters(), None)
    if weight is None or not type(module).__module__.startswith(MODELS):
        return True
    try:
        x = torch.zeros(1, 1, projection.inputs, device=device_of(module), dtype=weight.dtype)
        output = module(x)
    except RuntimeError:
        return False
    return isinstance(output, Tensor) and output.shape == (1, 1, projection.outputs)


# --- the active scorer ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ActiveRows:
    """Rows `start` to `stop` of `scorer` are the last positions of a forward of shape (B, T)."""

    scorer: nn.Module
    start: int
    stop: int
    shape: tuple[int, int]

    @property
    def count(self) -> int:
        return self.stop - self.start

    def put(self, h: Tensor, rows: Tensor, module: nn.Module) -> Tensor:
        """`h` with the rows in place of its last positions."""
        axis = self._axis(h, module)
        at = self.shape[1] - self.count  # Reformer pads behind them
        rows = rows[self.start : self.stop].to(device=h.device, dtype=h.dtype)
        rows = (rows if axis == 1 else rows.unsqueeze(1)).expand_as(h.narrow(axis, at, self.count))
        if h.shape[axis] == self.count:  # all positions are rows
            return rows.clone()  # not the parameter itself: CTRL scales what it looked up in place
        behind = at + self.count
        parts = [h.narrow(axis, 0, at), rows, h.narrow(axis, behind, h.shape[axis] - behind)]
        return torch.cat(parts, dim=axis)

    def add(self, h: Tensor, x: Tensor, change: nn.Module, module: nn.Module) -> Tensor:
        """`h` with `change(x)` added at the rows' positions alone."""
        if h.dim() == 2:  # positions of all prompts in one row: some mixtures of experts
            return self._add_flat(h, x, change, module)
        axis = self._axis(h, module)
        # What is cached may come first, earlier rows too: DeepSeek expands its latents once more.
        count = self.count if h.shape[axis] == self.shape[1] else self.stop
        before = h.shape[axis] - count
        if not before and not torch.is_grad_enabled():  # a step on a cache: all positions are rows
            return h.add_(change(x).to(h.dtype))
        own = change(x.narrow(axis, before, count)).to(h.dtype)
        if not torch.is_grad_enabled():  # in place, for the prompt is long
            h.narrow(axis, before, count).add_(own)
            return h
        changed = h.narrow(axis, before, count) + own
        return torch.cat([h.narrow(axis, 0, before), changed], dim=axis)

    def _add_flat(self, h: Tensor, x: Tensor, change: nn.Module, module: nn.Module) -> Tensor:
        batch, length = self.shape
        if h.shape[0] != batch * length:
            raise _elsewhere(module, h)
        deep = self.add(h.unflatten(0, self.shape), x.unflatten(0, self.shape), change, module)
        return deep.flatten(0, 1)

    def _axis(self, h: Tensor, module: nn.Module) -> int:
        """The axis of positions: the last but one, or (XLNet) the first."""
        batch, length = self.shape
        for axis, of_batch in ((h.dim() - 2, 0), (0, 1)):
            if h.dim() > 2 and h.shape[of_batch] == batch and h.shape[axis] >= length:
                return axis
        raise _elsewhere(module, h)


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.rows: ActiveRows | None = None


_state = _ThreadState()


def active_rows(scorer: nn.Module) -> ActiveRows | None:
    """The rows of `scorer` that are active in this thread; None while it is not."""
    rows = _state.rows
    return rows if rows is not None and rows.scorer is scorer else None


@contextmanager
def activated(rows: ActiveRows) -> Iterator[None]:
    before, _state.rows = _state.rows, rows
    try:
        yield
    finally:
        _state.rows = before


def _elsewhere(module: nn.Module, h: Tensor) -> UnsupportedModel:
    return UnsupportedModel(
        f"a {type(module).__name__} returns {tuple(h.shape)}, in which the [CPX] positions cannot "
        "be located: leave it out of lora_targets"
    )
