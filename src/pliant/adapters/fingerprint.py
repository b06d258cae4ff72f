"""Which base model is this? Names, shapes and a few hundred values, small enough for any file.

The values are rounded to bf16, so that an fp32 model and its bf16 copy have one fingerprint. A copy
that went through fp16 on the way has been rounded twice: it may differ by one step of bf16, and is
recognised by its values (all of them fp16 numbers, not all of them bf16 numbers), whatever its
dtype says now. Only against such a copy, one step is forgiven. (An fp16 copy that was converted on
to bf16 cannot be told from a trained one: there, the user has to insist.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pliant import loading
from pliant.anatomy.unwrap import unwrap

TENSORS = 64  # so many matrices are looked at, evenly spread over the model,
VALUES = 8  # and so many values of each
QUANTISED = "the base is quantised"
SHARDED = "the base is sharded"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Fingerprint:
    """What a base model is made of. `samples` is empty where only names and shapes can be known."""

    model: str
    """The class, for messages."""
    name: str
    """The name on the hub, or of an embedded model; empty if it has none."""
    shapes: dict[str, int]
    """`model.layers.*.mlp.down_proj.weight [64, 256]` -> how many there are."""
    samples: dict[str, str]
    """Tensor -> the bf16 bits of a few of its values, as hexadecimal digits."""
    grid: str
    """The coarsest of bf16, fp16, fp32 that holds all sampled values exactly."""
    why: str
    """Why there are no samples; empty if there are."""

    @property
    def level(self) -> str:
        """How much a comparison with this fingerprint can prove: `values`, or `shapes` alone."""
        return "values" if self.samples else "shapes"

    def differences(self, other: Fingerprint) -> str:
        """What sets the other ("here") apart from this ("there"), as far as both know; or empty."""
        return self._shape_differences(other) or self._value_differences(other)

    def _shape_differences(self, other: Fingerprint) -> str:
        mine, theirs = self.shapes, other.shapes
        if self.why == QUANTISED != other.why:  # a quantised model may hold scales besides
            mine = {k: n for k, n in mine.items() if k in theirs}
        if other.why == QUANTISED != self.why:
            theirs = {k: n for k, n in theirs.items() if k in mine}
        unlike = {k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k)}
        names = sorted({k.split(" ")[0] for k in unlike})
        shown = [f"{n} is {_shapes(n, theirs)} here and {_shapes(n, mine)} there" for n in names]
        more = [f"{len(names) - 3} more differences"] if len(names) > 3 else []
        return "; ".join(shown[:3] + more)

    def _value_differences(self, other: Fingerprint) -> str:
        forgiving = (self.grid == "fp16") != (other.grid == "fp16")
        common = self.samples.keys() & other.samples.keys()
        mine, theirs = self.samples, other.samples
        unlike = sorted(n for n in common if not _same(mine[n], theirs[n], forgiving))
        if not unlike:
            return ""
        return f"the values of {unlike[0]} differ ({len(unlike)} of {len(common)} sampled tensors)"


def fingerprint(model: nn.Module) -> Fingerprint:
    """The fingerprint of the base alone, whatever is attached to it, wraps it or adapts it."""
    base = unwrap(model)
    tensors = list(_tensors(base))
    why = _why_no_values(base, tensors)
    sampled = {} if why else _sampled([(name, t) for name, _, t in tensors if t is not None])
    return Fingerprint(
        model=type(base).__name__,
        name=_hub_name(base),
        shapes=dict(Counter(f"{_every_layer(name)} {shape}" for name, shape, _ in tensors)),
        samples={name: _bits(values) for name, values in sampled.items()},
        grid=_grid(list(sampled.values())),
        why=why,
    )


# --- what there is -------------------------------------------------------------------------------


def _tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, list[int], Tensor | None]]:
    """(name, shape, tensor) of each parameter; the tensor is None where its values say nothing.

    Tied weights come under each of their names, so a model is itself whether tied or copied.
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
    """What one of peft's layers stands for: of an adapted, a copied or a partly trained layer."""
    for name in ("base_layer", "original_module"):
        if isinstance(inner := getattr(module, name, None), nn.Module):
            return inner
    return None


def _quantised_shape(module: nn.Module) -> list[int] | None:
    """[out, in] of a linear layer whose weight is packed, missing or in less than 16 bits."""
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not isinstance(rows, int) or not isinstance(columns, int):
        return None
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype not in FLOATS:
        return [rows, columns]
    packed = weight.dim() == 2 and weight.numel() != rows * columns
    return [rows, columns] if packed and not _is_sharded(weight) else None


def _hub_name(base: nn.Module) -> str:
    """What it was loaded from, unless that is a path: it says more of a machine than of a model.

    The folder of an embedded model is that model on every machine, by its name.
    """
    name = str(getattr(getattr(base, "config", None), "_name_or_path", ""))
    if Path(name).parent == loading.WEIGHTS:
        return Path(name).name
    is_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) and not Path(name).exists()
    return name if is_name else ""


def _every_layer(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _shapes(name: str, known: dict[str, int]) -> str:
    """`[64, 64]`, or `[64, 64] x2` for a name that stands for two layers, or `absent`."""
    found = {k.removeprefix(f"{name} "): n for k, n in known.items() if k.split(" ")[0] == name}
    return " and ".join(f"{k} x{n}" if n > 1 else k for k, n in sorted(found.items())) or "absent"


def _why_no_values(base: nn.Module, tensors: list[tuple[str, list[int], Tensor | None]]) -> str:
    present = [t for _, _, t in tensors if t is not None]
    if getattr(base, "is_quantized", False) or len(present) < len(tensors):
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


# --- a few of its values -------------------------------------------------------------------------


def _sampled(named: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """A few values, in fp32, of evenly spaced matrices (of vectors, where there is no matrix)."""
    real = [(n, t) for n, t in named if not t.is_meta]  # some of an offloaded base are
    matrices = sorted((n, t) for n, t in real if t.dim() >= 2) or sorted(real)
    step = max(1, len(matrices) / TENSORS)
    chosen = [matrices[int(i * step)] for i in range(min(TENSORS, len(matrices)))]
    return {name: _values(tensor.detach()) for name, tensor in chosen}


def _values(tensor: Tensor) -> Tensor:
    """VALUES entries, evenly spaced, gathered without flattening (which may copy the tensor)."""
    n = tensor.numel()
    where = torch.arange(VALUES, device=tensor.device) * n // VALUES + n // (2 * VALUES)
    return tensor[torch.unravel_index(where, tensor.shape)].to("cpu", torch.float32)


def _bits(values: Tensor) -> str:
    bits = values.to(torch.bfloat16).view(torch.int16).tolist()
    return "".join(f"{b & 0xFFFF:04x}" for b in bits)


def _grid(values: list[Tensor]) -> str:
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if all(torch.equal(v, v.to(dtype).to(torch.float32)) for v in values):
            return name
    return "fp32"


# --- the comparison ------------------------------------------------------------------------------


def _same(a: str, b: str, forgiving: bool) -> bool:
    if a == b or len(a) != len(b) or not forgiving:
        return a == b
    x, y = _floats(a), _floats(b)
    one_step = 2**-7 * torch.maximum(x.abs(), y.abs()) + 2**-24  # fp16's smallest number is 2^-24
    return bool(((x - y).abs() <= one_step).all())


def _floats(bits: str) -> Tensor:
    numbers = [int(bits[i : i + 4], 16) for i in range(0, len(bits), 4)]
    return torch.tensor(numbers, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
