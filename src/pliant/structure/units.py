"""The units of a model that can be scaled or removed, and the module at which each is scaled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from pliant.anatomy import Anatomy
from pliant.anatomy.slices import Slices
from pliant.errors import UnsupportedModel
from pliant.structure.config import KINDS, Kind

MULTIPLE = 8
"""Matrix kernels prefer such widths."""


@dataclass(frozen=True, eq=False)
class Site:
    """The units of one kind in one block of a layer."""

    kind: Kind
    layer: int
    block: int
    """Which of the layer's blocks of this kind; nearly always 0, the only one."""
    module: nn.Module
    """For heads and channels the projection that reads them; for experts the module that holds
    them; for a half the projection that ends it; for slices of a parameter the module that has it;
    or the layer."""
    count: int
    width: int = 1
    """Features of the projection's input for each unit."""
    axis: int = 1
    """The axis of the projection's weight for its inputs."""
    groups: int = 0
    """For heads: how many KV heads share them. For recurrent heads: how many keys do."""
    slices: Slices | None = None
    """The parameter whose slices they are, if no projection reads them alone."""
    block_module: nn.Module | None = None
    """For recurrent heads the mixer, which runs `module` last."""

    @property
    def key(self) -> str:
        """Its name among the sites of its kind: the layer, and the block if there are several."""
        return f"{self.layer}_{self.block}" if self.block else str(self.layer)


def sites_of(anatomy: Anatomy, kinds: Iterable[Kind]) -> list[Site]:
    """Every site of these kinds, kind after kind, in the order of the layers.

    A block that several layers share (Zamba's) is one site, of the first of them.
    """
    sites: list[Site] = []
    for kind in kinds:
        own = list(_without_repeats(_sites(anatomy, kind)))
        if not own:
            raise _no_site(anatomy, kind)
        sites += own
    return sites


def units_of(site: Site) -> int:
    """The units that can be removed: heads that share a key, or single ones where all share it."""
    return site.groups if site.groups > 1 else site.count


def removed_of(site: Site, share: float) -> int:
    """How many units of the site a share is; of many channels a multiple of 8 stays."""
    units = units_of(site)
    remaining = units - round(share * units)
    if site.kind == "channels" and remaining > MULTIPLE**2:
        remaining = round(remaining / MULTIPLE) * MULTIPLE
    return units - remaining


def _sites(anatomy: Anatomy, kind: Kind) -> Iterator[Site]:
    for i, layer in enumerate(anatomy.layers):
        if kind == "layers":
            yield Site(kind, i, 0, layer, 1)
        elif kind == "heads":
            for j, a in enumerate(anatomy.attentions(i)):
                yield Site(kind, i, j, a.output, a.heads, a.head_dim, a.axis, a.kv_heads)
            for j, s in enumerate(anatomy.sliced_heads(i)):
                yield Site(kind, i, j, s.holder, s.count, groups=s.count, slices=s)
        elif kind == "channels":
            for j, m in enumerate(anatomy.mlps(i)):
                yield Site(kind, i, j, m.down, m.width, 1, m.axis)
        elif kind == "experts":
            for j, mixture in enumerate(anatomy.mixtures(i)):
                yield Site(kind, i, j, mixture.experts, mixture.count)
        elif kind == "attention":
            for j, a in enumerate(anatomy.attentions(i)):
                yield Site(kind, i, j, a.output, 1)
        elif kind == "mlp":
            ends = [m.down for m in anatomy.mlps(i)] + [m.experts for m in anatomy.mixtures(i)]
            for j, end in enumerate(ends):
                yield Site(kind, i, j, end, 1)
        elif kind == "expert_channels":
            for j, s in enumerate(anatomy.expert_channels(i)):
                yield Site(kind, i, j, s.holder, s.count, slices=s)
        elif kind == "recurrent_heads":
            for j, r in enumerate(anatomy.recurrent(i)):
                own = (r.output, r.heads, r.head_dim, r.axis, r.groups)
                yield Site(kind, i, j, *own, block_module=r.block)


def modules_with_heads(anatomy: Anatomy, layer: int) -> list[nn.Module]:
    """The module of each of the layer's sites of heads, also if it is another layer's (Zamba)."""
    return [
        *(attention.output for attention in anatomy.attentions(layer)),
        *(slices.holder for slices in anatomy.sliced_heads(layer)),
    ]


def check_projections(sites: Iterable[Site], what: str) -> None:
    """Refuse sites whose units are slices of a parameter, for `what` needs a projection."""
    for site in sites:
        if site.slices is not None:
            raise UnsupportedModel(
                f"the {site.kind} of layer {site.layer} are slices of {site.slices.path}, which no "
                f"projection reads alone, and {what} needs one"
            )


def _without_repeats(sites: Iterable[Site]) -> Iterator[Site]:
    seen: set[int] = set()
    for site in sites:
        if id(site.module) not in seen:
            seen.add(id(site.module))
            yield site


def _no_site(anatomy: Anatomy, kind: Kind) -> UnsupportedModel:
    why = {
        "heads": anatomy.why_no_attention,
        "attention": anatomy.why_no_attention,
        "experts": anatomy.why_no_mixture,
        "expert_channels": anatomy.why_no_expert_channels,
        "recurrent_heads": anatomy.why_no_recurrent,
    }.get(kind, anatomy.why_no_mlp)
    every = range(len(anatomy.layers))
    reasons = "; ".join(dict.fromkeys(reason for i in every if (reason := why(i))))
    others = [k for k in KINDS if k != kind and any(True for _ in _sites(anatomy, k))]
    return UnsupportedModel(
        f"{type(anatomy.model).__name__} has no {kind} to gate: {reasons}. It has "
        f"{', '.join(others)}: GateConfig(units=({others[0]!r},))"
    )
