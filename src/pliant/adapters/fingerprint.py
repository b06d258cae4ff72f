"""Identifies a base model by its names, shapes and a few hundred values.

The values are rounded to bf16, so an fp32 model and its bf16 copy have the same fingerprint. A copy
that was converted to fp16 has been rounded twice and may differ by one step of bf16. We recognize
such a copy, whatever its dtype is now, by its values: all are fp16 numbers and some are no bf16
numbers. Only then a difference of one step is allowed. (An fp16 copy that was converted to bf16
looks like a trained model: the user has to pass insist=True.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from pliant import loading
from pliant.adapters.active_peft import active_layers
from pliant.anatomy.find import unwrap

TENSORS = 64  # sampled matrices, evenly spread over the model
LAYERS = 16  # sampled layers of a PEFT adapter
VALUES = 8  # sampled values of each matrix
LAYER = re.compile(r"(?<=\.)\d+(?=\.)")  # a layer's index in the name of a tensor
QUANTISED = "the base is quantised"
SHARDED = "the base is sharded"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Fingerprint:
    """A base model's tensors. `samples` is empty if the values cannot be compared."""

    model: str
    """The class, for messages."""
    name: str
    """The name on the hub, or of an embedded model; empty if it has none."""
    shapes: dict[str, int]
    """`model.layers.*.mlp.down_proj.weight [64, 256]` -> the number of such tensors."""
    samples: dict[str, str]
    """Tensor -> the bf16 bits of a few of its values, as hexadecimal digits."""
    grid: str
    """The coarsest of bf16, fp16, fp32 that holds all sampled values exactly."""
    why: str
    """Why there are no samples; empty if there are."""
    adapters: dict[str, dict[str, str]] | None = None
    """Active PEFT adapter -> its tensors' values, as in `samples`; empty if none changes the base.
    None if unknown: in older files, and where its values are sharded."""

    @property
    def level(self) -> str:
        """What a comparison with this fingerprint covers: `values`, or `shapes` alone."""
        return "values" if self.samples else "shapes"

    def differences(self, here: Fingerprint) -> str:
        """The differences of the base `here` from this one ("there"); empty if there are none."""
        return (
            self._shape_differences(here)
            or self._value_differences(here)
            or self._adapter_differences(here)
        )

    def _shape_differences(self, here: Fingerprint) -> str:
        ours, theirs = self.shapes, here.shapes
        if self.why == QUANTISED != here.why:  # a quantised model may have scales as well
            ours = {k: n for k, n in ours.items() if k in theirs}
        if here.why == QUANTISED != self.why:
            theirs = {k: n for k, n in theirs.items() if k in ours}
        unequal = {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)}
        names = sorted({k.split(" ")[0] for k in unequal})
        lines = [f"{n} is {_shapes(n, theirs)} here and {_shapes(n, ours)} there" for n in names]
        more = [f"{len(names) - 3} more differences"] if len(names) > 3 else []
        return "; ".join(lines[:3] + more)

    def _value_differences(self, here: Fingerprint) -> str:
        allow_step = (self.grid == "fp16") != (here.grid == "fp16")
        common = self.samples.keys() & here.samples.keys()
        ours, theirs = self.samples, here.samples
        unequal = sorted(n for n in common if not _same(ours[n], theirs[n], allow_step))
        if not unequal:
            return ""
        return (
            f"the values of {unequal[0]} differ ({len(unequal)} of {len(common)} sampled tensors)"
        )

    def _adapter_differences(self, here: Fingerprint) -> str:
        """By their values: the same adapter may have another name."""
        if self.adapters is None or here.adapters is None:
            return ""
        allow_step = (self.grid == "fp16") != (here.grid == "fp16")
        absent, extra = dict(self.adapters), dict(here.adapters)
        for name, values in self.adapters.items():
            for other in [n for n in extra if _same_values(values, extra[n], allow_step)][:1]:
                del absent[name], extra[other]
        if not absent and not extra:
            return ""
        active = [", ".join(map(repr, sorted(names))) or "none" for names in (extra, absent)]
        return f"active PEFT adapters that differ: {active[0]} here and {active[1]} there"


def fingerprint(model: nn.Module, *, ignore: str = "") -> Fingerprint:
    """The fingerprint of the base, without Pliant's adapters and wrappers. PEFT's adapters count if
    they are active and change it, unless a part of their layers is called `ignore`."""
    base = unwrap(model)
    tensors = list(_tensors(base))
    why = _why_no_values(base, tensors)
    sampled = {} if why else _sampled([(name, t) for name, _, t in tensors if t is not None])
    return Fingerprint(
        model=type(base).__name__,
        name=_hub_name(base),
        shapes=dict(Counter(f"{LAYER.sub('*', name)} {shape}" for name, shape, _ in tensors)),
        samples={name: _bits(values) for name, values in sampled.items()},
        grid=_grid(list(sampled.values())),
        why=why,
        adapters=_adapters(base, ignore),
    )


def with_values(base: Fingerprint, values: Iterable[tuple[str, Tensor]]) -> Fingerprint:
    """The fingerprint of a base without weights at hand, with these of its tensors."""
    sampled = {name: _values(tensor) for name, tensor in values}
    return replace(
        base,
        samples={name: _bits(own) for name, own in sampled.items()},
        grid=_grid(list(sampled.values())),
        why="",
    )


def is_packed(model: nn.Module) -> bool:
    """Whether any parameter of the base really holds fewer bits than it has values."""
    base = unwrap(model)
    return _why_no_values(base, list(_tensors(base))) == QUANTISED


# --- tensors -------------------------------------------------------------------------------------


def _tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, list[int], Tensor | None]]:
    """(name, shape, tensor) of each parameter; the tensor is None if its values are packed.

    Tied weights have an entry for each of their names, so that tying changes nothing.
    """
    if getattr(module, "hidden_from_state_dict", False):
        return
    if (inner := _inside_peft(module)) is not None:
        yield from _tensors(inner, prefix)
        return
    if (logical := _quantised_shape(module)) is not None:
        yield f"{prefix}weight", logical, None
        named = [("bias", bias)] if (bias := module._parameters.get("bias")) is not None else []
    else:
        named = [(name, p) for name, p in module._parameters.items() if p is not None]
    for name, p in named:
        yield prefix + name, list(getattr(p, "ds_shape", p.shape)), p  # ds: DeepSpeed's ZeRO-3
    for name, child in module._modules.items():
        if child is not None:
            yield from _tensors(child, f"{prefix}{name}.")


def _inside_peft(module: nn.Module) -> nn.Module | None:
    """The layer inside one of peft's: of an adapted, a copied or a partly trained layer."""
    for name in ("base_layer", "original_module"):
        if isinstance(inner := getattr(module, name, None), nn.Module):
            return inner
    return None


def _quantised_shape(module: nn.Module) -> list[int] | None:
    """[out, in] of a linear layer whose weight is packed, missing or has less than 16 bits."""
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not isinstance(rows, int) or not isinstance(columns, int):
        return None
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype not in FLOATS:
        return [rows, columns]
    packed = weight.dim() == 2 and weight.numel() != rows * columns
    return [rows, columns] if packed and not _is_sharded(weight) else None


def _hub_name(base: nn.Module) -> str:
    """The name that the base was loaded from, unless that is a path, which may be private."""
    return loading.public_name(str(getattr(getattr(base, "config", None), "_name_or_path", "")))


def _shapes(name: str, counts: dict[str, int]) -> str:
    """`[64, 64]`, or `[64, 64] x2` for a tensor of two layers, or `absent`."""
    own = {k.removeprefix(f"{name} "): n for k, n in counts.items() if k.split(" ")[0] == name}
    return " and ".join(f"{k} x{n}" if n > 1 else k for k, n in sorted(own.items())) or "absent"


def _why_no_values(base: nn.Module, tensors: list[tuple[str, list[int], Tensor | None]]) -> str:
    present = [t for _, _, t in tensors if t is not None]
    if len(present) < len(tensors):  # not base.is_quantized: a dequantised GGUF has that mark, too
        return QUANTISED
    flattened = any(getattr(m, "_is_fsdp_managed_module", False) for m in base.modules())
    if flattened or any(_is_sharded(t) for t in present):
        return SHARDED
    if any(t.dtype not in FLOATS or type(t.data) is not Tensor for t in present):
        return QUANTISED
    if all(t.is_meta for t in present):
        return "the base has no weights at hand"
    return ""


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor") or tensor.numel() == 0


# --- values --------------------------------------------------------------------------------------


def _sampled(named: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """A few values, in fp32, of evenly spaced matrices (or vectors, if there are no matrices)."""
    real = [(n, t) for n, t in named if not t.is_meta]  # an offloaded base has meta tensors
    matrices = sorted((n, t) for n, t in real if t.dim() >= 2) or sorted(real)
    step = max(1, len(matrices) / TENSORS)
    chosen = [matrices[int(i * step)] for i in range(min(TENSORS, len(matrices)))]
    return {name: _values(tensor.detach()) for name, tensor in chosen}


def _adapters(base: nn.Module, ignore: str) -> dict[str, dict[str, str]] | None:
    """The values of each active PEFT adapter: all tensors of evenly spaced layers."""
    sampled: dict[str, dict[str, str]] = {}
    for name, layers in active_layers(base, ignore).items():
        if any(_is_sharded(t) or t.is_meta for layer in layers for t in layer.tensors.values()):
            return None
        count = min(LAYERS, len(layers))
        chosen = [layers[i * len(layers) // count] for i in range(count)]
        sampled[name] = {
            f"{layer.path}.{tensor}": _bits(_values(t.detach()))
            for layer in chosen
            for tensor, t in layer.tensors.items()
        }
        sampled[name]["scaling"] = _bits(torch.tensor([layer.scaling for layer in chosen]))
    return sampled


def _values(tensor: Tensor) -> Tensor:
    """VALUES entries, evenly spaced, gathered without flattening (which may copy the tensor)."""
    return tensor[_evenly_spaced(tensor.shape)].to("cpu", torch.float32)


@lru_cache(maxsize=1024)
def _evenly_spaced(shape: torch.Size) -> tuple[Tensor, ...]:
    """The indices of VALUES entries, an axis each. Attaching fingerprints, and many tensors have
    one shape: finding the places costs more than reading them."""
    n = shape.numel()
    where = torch.arange(VALUES) * n // VALUES + n // (2 * VALUES)
    return torch.unravel_index(where, shape)


def _bits(values: Tensor) -> str:
    bits = values.to(torch.bfloat16).view(torch.int16).tolist()
    return "".join(f"{b & 0xFFFF:04x}" for b in bits)


def _grid(values: list[Tensor]) -> str:
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if all(torch.equal(v, v.to(dtype).to(torch.float32)) for v in values):
            return name
    return "fp32"


def _same(a: str, b: str, allow_step: bool) -> bool:
    if a == b or len(a) != len(b) or not allow_step:
        return a == b
    x, y = _floats(a), _floats(b)
    one_step = 2**-7 * torch.maximum(x.abs(), y.abs()) + 2**-24  # fp16's smallest number is 2^-24
    return bool(((x - y).abs() <= one_step).all())


def _same_values(a: dict[str, str], b: dict[str, str], allow_step: bool) -> bool:
    return a.keys() == b.keys() and all(_same(a[name], b[name], allow_step) for name in a)


def _floats(bits: str) -> Tensor:
    numbers = [int(bits[i : i + 4], 16) for i in range(0, len(bits), 4)]
    return torch.tensor(numbers, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
