"""A layer's attention, MLP and mixture of experts: the modules that end them, and their units."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from pliant.anatomy.config import read


@dataclass(frozen=True)
class Projection:
    """A projection and its path; `axis` is the axis of its weight for its inputs."""

    path: str
    module: nn.Module
    inputs: int
    outputs: int
    axis: int

    @property
    def names(self) -> tuple[str, str]:
        """Its own name and its parent's, which identifies Moshi's `o_proj.linear`."""
        parent, _, leaf = self.path.rpartition(".")
        return leaf, parent.rpartition(".")[2]


def as_projection(module: nn.Module, path: str = "") -> Projection | None:
    """The module as a projection, or None. A packed weight has another shape, so the sizes are
    attributes of the module."""
    # A LoRA layer replaces the projection that it wraps: its inputs are the same, and a hook on it
    # covers both branches.
    inner = module
    while isinstance(wrapped := getattr(inner, "base_layer", None), nn.Module):
        inner = wrapped
    if isinstance(inputs := getattr(inner, "in_features", None), int) and isinstance(
        outputs := getattr(inner, "out_features", None), int
    ):
        return Projection(path, module, inputs, outputs, axis=1)
    # transformers' Conv1D (GPT-2) has a transposed weight.
    if isinstance(inputs := getattr(inner, "nx", None), int) and isinstance(
        outputs := getattr(inner, "nf", None), int
    ):
        return Projection(path, module, inputs, outputs, axis=0)
    return None


def projections(root: nn.Module, path: str = "") -> Iterator[Projection]:
    """Every projection below `root`, in order of registration."""
    for name, child in root.named_children():
        child_path = f"{path}.{name}" if path else name
        if (projection := as_projection(child, child_path)) is not None:
            yield projection
        else:
            yield from projections(child, child_path)


# --- attention ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """Head h is the features [h * head_dim, (h + 1) * head_dim) of the input of `output`.

    `axis` is the axis of `output.weight` for those features; `output_name` is its path inside the
    layer. If several layers share one block (Zamba), their outputs share one weight.
    """

    output: nn.Module
    output_name: str
    heads: int
    head_dim: int
    kv_heads: int
    axis: int


@dataclass(frozen=True)
class Absent:
    """A layer has no such part, for this reason."""

    reason: str


# Names are hints: a projection must also have heads * head_dim inputs.
OUTPUT_NAMES = (
    "o_proj", "out_proj", "dense", "c_proj", "Wo", "wo", "out_lin", "attention_out",
)  # fmt: skip
HEAD_COUNTS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "num_q_heads",
    "n_attn_heads",
)
KV_COUNTS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads", "kv_n_heads")
HEAD_WIDTHS = ("v_head_dim", "head_dim", "head_size", "attention_head_size", "dim_head")

_QUERY = re.compile(r"(^|_)(q|query|qkv|Wqkv|Wq|W_pack)(_|$)|^c_attn$")
_INWARD = re.compile(r"(^|_)(q|k|v|kv|query|key|value|qkv|Wqkv|g|gate|gates)(_|$)|c_attn|W_pack")
_CROSS = re.compile(r"cross|encoder_attn", re.IGNORECASE)
# Gates of a recurrent cell: it has queries and keys, but no softmax over the past.
_RECURRENT = re.compile(r"igate|fgate|time_decay|A_log|dt_bias")
NO_SOFTMAX_TYPES = re.compile(r"linear|mamba|conv|recurrent", re.IGNORECASE)


def find_attention(
    layer: nn.Module,
    config: Any,
    layer_type: str | None,
    named: str | None = None,
    heads: int | None = None,
) -> tuple[Attention, ...] | Absent:
    """The attention blocks of one layer, in order of registration; nearly always one, or none.

    `named` is the path of the output projection in the layer, or the end of it, if the user names
    it; `heads` is the number of heads, if the model does not contain it.
    """
    if named is not None:
        chosen = [p for p in projections(layer) if f".{p.path}".endswith(f".{named}")]
        if not chosen:
            return Absent(f"no projection named {named}")
        return _measured([(p, _parent(layer, p.path)) for p in chosen], config, heads)
    if layer_type is not None and NO_SOFTMAX_TYPES.search(layer_type):
        return Absent(f"a {layer_type} layer: it has no softmax attention")
    if candidates := list(_candidates(layer)):
        return _measured(candidates, config, heads)
    return _unnamed(layer, config) or Absent(_why_none(layer))


def _candidates(layer: nn.Module) -> Iterator[tuple[Projection, nn.Module]]:
    """Projections with the name of an output, each with the block whose queries it belongs to."""
    blocks = {path: block for path, block in layer.named_modules() if _makes_queries(block)}
    for projection in projections(layer):
        if not set(projection.names) & set(OUTPUT_NAMES) or _CROSS.search(projection.path):
            continue
        ancestors = _ancestors(projection.path)
        # BERT's `attention.output.dense` closes `attention`, whose `self` makes the queries;
        # the layer itself is a block only if it makes them with its own children.
        path = next((a for a in ancestors if _holds_block(a, blocks)), None)
        if path is not None and not _is_recurrent(block := layer.get_submodule(path)):
            yield projection, block


def _unnamed(layer: nn.Module, config: Any) -> tuple[Attention, ...]:
    """Outputs by shape alone, whatever their names: the only child of a block that fits.

    Its inputs are all heads, and its outputs as many features as the queries' inputs.
    """
    blocks: list[Attention] = []
    for path, block in layer.named_modules():
        own = [p for p in projections(block, path) if p.path.rpartition(".")[0] == path]
        query_inputs = {p.inputs for p in own if _QUERY.search(p.names[0])}
        if _is_recurrent(block) or _CROSS.search(path):
            continue
        outward = [p for p in own if p.outputs in query_inputs and not _INWARD.search(p.names[0])]
        fitting = [
            m for p in outward if isinstance(m := _measure(p, block, config, None), Attention)
        ]
        blocks += fitting if len(fitting) == 1 else []
    return tuple(blocks)


def _holds_block(path: str, blocks: dict[str, nn.Module]) -> bool:
    if path == "":
        return "" in blocks
    return any(inner == path or inner.startswith(path + ".") for inner in blocks)


def _makes_queries(module: nn.Module) -> bool:
    """Whether a child projects to queries; the keys may be another layer's (Gemma 3n)."""
    return any(_QUERY.search(name) for name, _ in module.named_children())


def _is_recurrent(block: nn.Module) -> bool:
    names = [n for n, _ in block.named_children()] + [n for n, _ in block.named_parameters()]
    return any(map(_RECURRENT.search, names))


def _measured(
    candidates: list[tuple[Projection, nn.Module]], config: Any, heads: int | None
) -> tuple[Attention, ...] | Absent:
    results = [_measure(projection, block, config, heads) for projection, block in candidates]
    fitting = tuple(result for result in results if isinstance(result, Attention))
    return fitting or next(result for result in results if isinstance(result, Absent))


def _measure(
    projection: Projection, block: nn.Module, config: Any, named_heads: int | None
) -> Attention | Absent:
    """Heads and their width that fit the projection, from the block or else from the config."""
    configs = [c for c in (getattr(block, "config", None), config) if c is not None]
    counts = [named_heads] if named_heads else numbers(HEAD_COUNTS, block, configs)
    widths = [*numbers(HEAD_WIDTHS, block, configs), *_default_widths(configs)]
    if named_heads:
        widths.append(projection.inputs // named_heads)
    for heads in counts:
        for width in widths:
            if heads * width == projection.inputs:
                joined = _joined(block, width)
                return Attention(
                    output=projection.module,
                    output_name=projection.path,
                    heads=heads // joined,
                    head_dim=width * joined,
                    kv_heads=max(1, _kv_heads(block, configs, heads) // joined),
                    axis=projection.axis,
                )
    return Absent(
        f"{projection.path} has {projection.inputs} inputs, which is no heads x head_dim "
        f"with heads in {counts} and head_dim in {widths}"
    )


def _default_widths(configs: list[Any]) -> list[int]:
    """hidden_size / heads, for models that do not name a width."""
    pairs = [(read(c, "hidden_size"), read(c, "num_attention_heads")) for c in configs]
    return [
        hidden // heads
        for hidden, heads in pairs
        if isinstance(hidden, int) and isinstance(heads, int) and heads
    ]


def _joined(block: nn.Module, width: int) -> int:
    """How many heads are joined to one: DiffLlama subtracts them in pairs, and norms each pair."""
    for name, child in block.named_children():
        shape = getattr(child, "normalized_shape", None)
        if "group" in name and shape and shape[-1] % width == 0:
            return int(shape[-1]) // width
    return 1


def _kv_heads(block: nn.Module, configs: list[Any], heads: int) -> int:
    groups = numbers(("num_key_value_groups",), block, [])
    if groups and heads % groups[0] == 0:
        return heads // groups[0]
    counts = [n for n in numbers(KV_COUNTS, block, configs) if heads % n == 0]
    return counts[0] if counts else heads


def numbers(names: tuple[str, ...], block: nn.Module, configs: list[Any]) -> list[int]:
    """The positive integers with these names in the block's modules, then in the configs."""
    holders = [m for m in block.modules() if not isinstance(m, nn.Linear)] + configs
    values = [read(holder, name) for holder in holders for name in names]
    integers = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0]
    return list(dict.fromkeys(integers))


def _ancestors(path: str) -> list[str]:
    """Of `a.b.c`: `a.b`, `a`, and the root."""
    parts = path.split(".")[:-1]
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def _parent(layer: nn.Module, path: str) -> nn.Module:
    return layer.get_submodule(path.rpartition(".")[0])


def _why_none(layer: nn.Module) -> str:
    paths = [path for path, _ in layer.named_modules()]
    asking = [m for m in layer.modules() if _makes_queries(m)]
    if any(map(_CROSS.search, paths)):
        return "it attends only to another modality (cross-attention)"
    if any(re.search(r"att.*expert", path) for path in paths):
        return "its heads are a mixture of experts: no single projection takes them all"
    if any(map(_is_recurrent, asking)):
        return "a recurrent layer: it has no softmax attention"
    if asking:
        return (
            f"no projection takes all its heads (looked for {', '.join(OUTPUT_NAMES)}, "
            "then for the only one of the right shape)"
        )
    if any(re.fullmatch(r"(.*\.)?q", name) for name, _ in layer.named_parameters()):
        return "its projections are bare parameters, no modules that a hook could sit on"
    return "nothing in it projects to queries: it has no softmax attention"


# --- the MLP --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mlp:
    """Channel c is input c of `down`; `axis` is the axis of `down.weight` for its inputs."""

    down: nn.Module
    down_name: str
    width: int
    axis: int


# Names are hints: a projection must also narrow to the hidden size what another one widened.
DOWN_NAMES = (
    "down_proj", "fc2", "dense_4h_to_h", "c_proj", "w2", "fc_out", "lin2", "Wo", "w_out",
    "output_linear", "proj_down", "layer_2", "dense", "output", "value", "2",
)  # fmt: skip


def find_mlp(
    layer: nn.Module, hidden_size: int, attention: tuple[str, ...], named: str | None = None
) -> tuple[Mlp, ...] | Absent:
    """The dense MLPs of one layer, nearly always one.

    `attention` are the paths of the attention's outputs. `named` is the path of the down projection
    in the layer, or the end of it, if the user names it.
    """
    candidates = list(projections(layer))
    if named is not None:
        chosen = [p for p in candidates if f".{p.path}".endswith(f".{named}")]
        return tuple(map(_as_mlp, chosen)) or Absent(f"no projection named {named}")
    mixtures = list(mixture_paths(layer))
    # A gated norm (A.X K2) narrows and widens the hidden state as well, but is no MLP.
    dense = [p for p in candidates if not below(p.path, mixtures) and "norm" not in p.path]
    downs = [
        p
        for p in dense
        if p.path not in attention
        and set(p.names) & set(DOWN_NAMES)
        and p.outputs == hidden_size
        and any(widens(up, p) for up in dense)
    ]
    if downs:
        widest = max(p.inputs for p in downs)
        return tuple(_as_mlp(p) for p in downs if p.inputs == widest)
    if mixtures:
        return Absent("its MLP is a mixture of experts: no single projection narrows it")
    return Absent("nothing in it widens the hidden state and narrows it again")


def widens(up: Projection, down: Projection) -> bool:
    """Whether `up` makes the inputs of `down`: as many, or twice as many with a gate."""
    return (
        up.path != down.path
        and up.inputs == down.outputs
        and up.outputs in (down.inputs, 2 * down.inputs)
        and up.path.split(".")[0] in (down.path.split(".")[0], *_flat_names(down))
    )


def _flat_names(down: Projection) -> tuple[str, ...]:
    """Up projections of BERT and BART, whose MLP is no module of its own."""
    return ("intermediate", "fc1", "lin1") if down.path.count(".") <= 1 else ()


def mixture_paths(layer: nn.Module) -> Iterator[str]:
    """The paths of experts, and of the blocks that route tokens to them."""
    for path, module in layer.named_modules():
        if "expert" in path.rpartition(".")[2] or "expert" in type(module).__name__.lower():
            yield path
            if parent := path.rpartition(".")[0]:
                yield parent


def below(path: str, roots: list[str]) -> bool:
    return any(path == root or path.startswith(root + ".") for root in roots)


def _as_mlp(projection: Projection) -> Mlp:
    return Mlp(projection.module, projection.path, projection.inputs, projection.axis)


# --- a mixture of experts -------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """Experts in one module that is called with (tokens, index of the chosen, their weights).

    Axis 0 of each parameter of `experts` is the expert.
    """

    experts: nn.Module
    experts_name: str
    count: int


def find_mixtures(layer: nn.Module) -> tuple[Mixture, ...] | Absent:
    """The mixtures of one layer, by their stacked weights: nearly always one, or none."""
    mixtures = []
    for path, module in layer.named_modules():
        stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3]
        if len(stacked) < 2 or "expert" not in f"{path}{type(module).__name__}".lower():
            continue  # JetMoE's two projections are modules of their own
        # LongCat's experts that do nothing have weights in `gate_up_proj` alone.
        count = min(p.shape[0] for p in stacked)
        if count > 1:
            mixtures.append(Mixture(module, path, count))
    return tuple(mixtures) or Absent("it has no mixture of experts with stacked weights")
