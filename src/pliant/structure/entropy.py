"""How evenly each head spreads its attention, from one forward with eager attention.

    entropies = attention_entropy(Anatomy.of(model), sites, {"input_ids": ids})
    entropies["3"]    # (heads,) of layer 3: 0 is one position, 1 is all of them alike

Eager attention returns its weights, and hooks on the attention modules see them: in 167 of the 175
types with attention, in a shape that can be read. (`output_attentions=True` would reach three more,
but then transformers leaves hooks of its own in the model, and every layer's weights are held.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pliant.anatomy import Anatomy
from pliant.anatomy.modes import attention_among, eval_mode
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.structure.units import Site

Entropies = dict[str, Tensor]


@torch.no_grad()
def attention_entropy(
    anatomy: Anatomy, sites: Sequence[Site], batch: Mapping[str, Any]
) -> Entropies:
    """The entropy of each site's heads on a batch, in eval mode."""
    model = anatomy.model
    mask_BT = mask_of(batch)
    with (
        eval_mode(model),
        attention_among(model, "eager"),
        recorded_entropy(anatomy, sites, mask_BT) as entropies,
    ):
        model(**batch, use_cache=False)
    return entropies


@contextmanager
def recorded_entropy(
    anatomy: Anatomy, sites: Sequence[Site], mask_BT: Tensor
) -> Iterator[Entropies]:
    """Yields what the end of the block fills: under each site's key the entropy of its heads, the
    mean over queries, as a share of log T for a row of T tokens."""
    entropies: Entropies = {}
    records: dict[str, list[Tensor]] = {site.key: [] for site in sites}
    with ExitStack() as hooks:
        for site in sites:
            record = _recorder(records[site.key], site.count, mask_BT)
            for module in _around(anatomy, site):
                hooks.callback(module.register_forward_hook(record).remove)
        yield entropies
    for site in sites:
        if not records[site.key]:
            raise UnsupportedModel(
                f"{type(anatomy.model).__name__} returns no attention weights in layer "
                f"{site.layer} (looked for {site.count} heads x queries x keys from eager "
                "attention), and entropy is made of them"
            )
        entropies[site.key] = torch.stack(records[site.key]).mean(0)


def mask_of(batch: Mapping[str, Any]) -> Tensor:
    """(rows, tokens): which tokens are real. Each row needs two: entropy is a share of log T."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise InvalidInput("the batch holds no input_ids of shape (rows, tokens)")
    mask = batch.get("attention_mask")
    mask_BT = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if mask_BT.shape != ids.shape:
        raise InvalidInput(
            f"attention_mask has shape {list(mask_BT.shape)}, and input_ids {list(ids.shape)}"
        )
    lengths = mask_BT.sum(1)
    if ids.numel() == 0 or int(lengths.min()) < 2:
        raise InvalidInput("the batch has a row of fewer than 2 tokens: leave it out")
    return mask_BT


def _around(anatomy: Anatomy, site: Site) -> Iterator[nn.Module]:
    """The modules around the attention's output projection: one of them returns the weights."""
    layer = anatomy.layers[site.layer]
    path = next(path for path, module in layer.named_modules() if module is site.module)
    if site.slices is not None:
        yield site.module  # which may be the attention itself
    while path:
        path = path.rpartition(".")[0]
        yield layer.get_submodule(path)


def _recorder(records: list[Tensor], heads: int, mask_BT: Tensor) -> Any:
    rows, tokens = mask_BT.shape

    def record(module: nn.Module, args: Any, output: Any) -> None:
        for value in output[1:] if isinstance(output, tuple) else ():
            is_weights = isinstance(value, Tensor) and value.is_floating_point()
            if is_weights and value.dim() == 4 and value.shape[:3] == (rows, heads, tokens):
                records.append(_entropy(value.detach(), mask_BT.to(value.device)))

    return record


def _entropy(weights_BHQK: Tensor, mask_BT: Tensor) -> Tensor:
    p = weights_BHQK.float()
    # Attention sinks (gpt-oss) take a share that is no position's.
    p = p / p.sum(-1, keepdim=True).clamp(min=1e-9)
    entropy_BHQ = -torch.xlogy(p, p).sum(-1)
    queries_BT = mask_BT.float()
    lengths_B = queries_BT.sum(1)
    share_BHQ = entropy_BHQ / lengths_B.log()[:, None, None]
    return torch.einsum("bhq,bq->h", share_BHQ, queries_BT) / lengths_B.sum()
