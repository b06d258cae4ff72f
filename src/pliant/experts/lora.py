"""An expert as a LoRA in PEFT's format, which needs no Pliant: for vLLM, and for everything else.

    result = to_lora(model, "math-lora", rank=16)
    PeftModel.from_pretrained(base, "math-lora")

What an expert adds to a weight, left diag(d) right, is its own singular value decomposition: the
ranks with the largest |s_i d_i| are the best ones, and no decomposition is computed here. A budget
of numbers is spent where a rank keeps the most energy for each number, over all weights.

The folder is reloaded by PEFT on a fresh model, and compared, before it gets its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pliant.adapters.files import check_new, new_folder
from pliant.adapters.stock import (
    PROBE,
    assembled,
    bound_of,
    difference_of,
    disagreement,
    logits_of,
)
from pliant.anatomy import Anatomy
from pliant.anatomy.find import unwrap
from pliant.anatomy.modes import eval_mode
from pliant.anatomy.trial import trial_ids
from pliant.errors import InvalidInput, UnsupportedModel, check_whole
from pliant.experts.expert import Expert, layers_of
from pliant.experts.export import check_leaves, chosen, on_its_base, stock_state
from pliant.experts.factors import factors_of
from pliant.experts.folder import CARD, PREFIX, WEIGHTS


@dataclass(frozen=True)
class LoraResult:
    """The LoRA, and how much of the expert it keeps."""

    folder: str
    experts: tuple[str, ...]
    parameters: int
    ranks: dict[str, int]
    """Of each weight; those that are left out have none."""
    energy: float
    """The share of the squared change of all weights that it keeps."""
    energies: dict[str, float]
    """The share of each weight."""
    logit_difference: float
    """The largest between the LoRA's and the expert's logits, relative to the largest logit."""
    effect: float
    """The same between the base's and the expert's, for comparison."""
    proof: float
    """The same between the reloaded LoRA and a model with the same change in its weights."""
    bound: float

    def as_dict(self) -> dict[str, Any]:
        """All but the folder, which depends on the machine and not on the model."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    def __str__(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        rank = f"rank {high}" if low == high else f"ranks {low} to {high}"
        return (
            f"{self.folder}: a LoRA of {self.parameters:,} numbers ({rank} in {len(self.ranks)} "
            f"weights) that keeps {self.energy:.1%} of the energy of {' + '.join(self.experts)}; "
            f"its logits are within {self.logit_difference:.1e} of the expert's, and the base's "
            f"within {self.effect:.1e}"
        )


def to_lora(
    model: nn.Module | str | Path,
    folder: str | Path,
    *,
    rank: int | None = None,
    budget: int | None = None,
    base: str | Path | None = None,
    experts: Sequence[str] | None = None,
) -> LoraResult:
    """Write a model's active experts, or these, to a new folder as one LoRA.

    Give `rank`, the same for every weight, or `budget`, how many numbers it may have in total. The
    model may be an expert's folder: then `base` is loaded (left out: the one that it names).
    """
    _check_size(rank, budget)
    target = Path(folder).expanduser()
    check_new(target)
    if isinstance(model, str | Path):
        model, _ = on_its_base(Expert.load(model), base)
    elif base is not None:
        raise InvalidInput("base goes with an expert's folder; a model has its base")
    stock: Any = unwrap(model)
    check_leaves(stock)
    with chosen(stock, experts) as names, eval_mode(stock):
        parts = _parts(stock)
        ranks = _same(parts, rank) if rank is not None else _best(parts, budget or 0)
        pairs = [part.pair(r, stock.dtype) for part, r in zip(parts, ranks, strict=True) if r]
        probe = trial_ids(Anatomy.of(stock), PROBE)
        live = logits_of(stock, probe)
        with new_folder(target) as unfinished:
            _write(unfinished, stock, pairs)
            measured = _proof(unfinished, stock, pairs, probe, live)
            result = _result(target, names, parts, ranks, measured)
            (unfinished / CARD).write_text(_card(result, unfinished, stock), encoding="utf-8")
    return result


def _check_size(rank: int | None, budget: int | None) -> None:
    if (rank is None) == (budget is None):
        raise InvalidInput("give rank, the same for every weight, or budget, numbers in total")
    for name, value in (("rank", rank), ("budget", budget)):
        if value is not None:
            check_whole(name, value, 1)


# --- what there is to keep -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Part:
    """What the experts add to one weight, the most important ranks first."""

    path: str
    """Of the module; several stacked weights may share it."""
    nesting: int
    """How deep PEFT nests it among these: the outermost is 0."""
    parameter: str
    module: nn.Module
    left: Tensor
    """(..., out, rank), with the change's sign and half of its size."""
    right: Tensor
    """(..., rank, in), with the other half."""
    gains: Tensor
    """(rank,): the energy that each further rank keeps; over the experts of a mixture, together."""

    @property
    def name(self) -> str:
        return self.path if self.parameter == "weight" else f"{self.path}.{self.parameter}"

    @property
    def cost(self) -> int:
        """The numbers of one rank."""
        *stack, rows, _ = self.left.shape
        return prod(stack) * (rows + self.right.shape[-1])

    def pair(self, rank: int, dtype: torch.dtype) -> Pair:
        left, right = self.left[..., :rank], self.right[..., :rank, :]
        return Pair(self, left.to(dtype), right.to(dtype))


@dataclass(frozen=True, eq=False)
class Pair:
    """The factors that are kept of a part."""

    part: Part
    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return self.left.shape[-1]

    @property
    def numbers(self) -> int:
        return self.left.numel() + self.right.numel()

    def as_saved(self) -> tuple[Tensor, Tensor]:
        """lora_A (rank, in) and lora_B (out, rank), as PEFT lays them out."""
        if self.left.dim() == 2:
            return self.right.contiguous(), self.left.contiguous()
        a_ERI, b_EOR = self.right, self.left
        if getattr(self.part.module, "is_transposed", False):  # its axes are (experts, in, out)
            a_ERI, b_EOR = self.left.mT, self.right.mT
        a = a_ERI.flatten(0, 1).contiguous()
        return a, b_EOR.permute(1, 2, 0).flatten(1).contiguous()

    def added(self) -> Tensor:
        """What it adds to the parameter, with the parameter's axes."""
        update = self.left.float() @ self.right.float()
        return update.T if isinstance(self.part.module, Conv1D) else update


@torch.no_grad()
def _parts(base: nn.Module) -> list[Part]:
    parts = []
    for path, layer in layers_of(base):
        change = layer.change_of(layer.active_adapters)
        if change is None or not bool(change.any()):
            continue
        factors, d = factors_of(layer, change.shape[-1]), change.detach()
        sizes = factors.values * d.to(factors.values)
        order = sizes.abs().argsort(dim=-1, descending=True, stable=True)
        gains = sizes.gather(-1, order).square()
        half = (d.abs().to(factors.values) * factors.values).sqrt()
        unit = factors.values.clamp_min(torch.finfo(half.dtype).tiny)
        left, right = _balanced(factors.left, factors.right, d, half, unit)
        parts.append(
            Part(
                path=path.replace(".base_layer", ""),
                nesting=path.count(".base_layer"),
                parameter=getattr(layer, "parameter_name", "weight"),
                module=layer.base(),
                left=left.gather(-1, order[..., None, :].expand_as(left)),
                right=right.gather(-2, order[..., :, None].expand_as(right)),
                gains=gains if gains.dim() == 1 else gains.sum(0),
            )
        )
    if not parts:
        raise InvalidInput("all z are 1: the expert is the base, and there is nothing to write")
    return parts


def _balanced(
    left: Tensor, right: Tensor, change: Tensor, half: Tensor, unit: Tensor
) -> tuple[Tensor, Tensor]:
    """Both factors with vectors of the same length, so that neither loses digits in bf16."""
    sign = change.sign().to(left)
    is_left_unit = left.shape[-2] < right.shape[-1]  # which of them has the singular vectors
    left_scale = half if is_left_unit else half / unit
    right_scale = half / unit if is_left_unit else half
    return left * (sign * left_scale)[..., None, :], right * right_scale[..., :, None]


# --- ranks ---------------------------------------------------------------------------------------


def _same(parts: Sequence[Part], rank: int) -> list[int]:
    """This rank for each, or all that there is."""
    return [min(rank, int((part.gains > 0).sum())) for part in parts]


def _best(parts: Sequence[Part], budget: int) -> list[int]:
    """The ranks that keep the most energy for each number.

    The ranks of a weight come in falling order of their energy, so taking the best that is left
    always takes a weight's next one.
    """
    offers = [
        (-float(gain) / part.cost, i, k)
        for i, part in enumerate(parts)
        for k, gain in enumerate(part.gains.tolist())
        if gain > 0
    ]
    ranks, left = [0] * len(parts), budget
    for _, i, k in sorted(offers):
        if ranks[i] == k and parts[i].cost <= left:
            ranks[i] += 1
            left -= parts[i].cost
    if not any(ranks):
        least = min(part.cost for part in parts)
        raise InvalidInput(f"budget = {budget:,}: one rank of the smallest weight takes {least:,}")
    return ranks


# --- writing and proof ---------------------------------------------------------------------------


def _write(folder: Path, base: Any, pairs: Sequence[Pair]) -> None:
    tensors: dict[str, Tensor] = {}
    for pair, path in zip(pairs, _paths(pairs), strict=True):
        a, b = pair.as_saved()
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a.cpu()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b.cpu()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    _config(base, pairs).save_pretrained(str(folder))


def _paths(pairs: Sequence[Pair]) -> list[str]:
    """With the `base_layer` of those whose modules hold several stacked weights."""
    paths = []
    for pair in pairs:
        outside = [
            other
            for other in pairs
            if other.part.path == pair.part.path and other.part.nesting < pair.part.nesting
        ]
        paths.append(pair.part.path + ".base_layer" * len(outside))
    return paths


def _config(base: Any, pairs: Sequence[Pair]) -> LoraConfig:
    """alpha is the rank everywhere, so PEFT scales nothing."""
    highest = max(pair.rank for pair in pairs)
    ranks = {pair.part.name: pair.rank for pair in pairs if pair.rank != highest}
    modules = [pair.part.path for pair in pairs if pair.part.parameter == "weight"]
    stacked = [pair.part.name for pair in pairs if pair.part.parameter != "weight"]
    return LoraConfig(
        r=highest,
        lora_alpha=highest,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        target_modules=_short(base, modules),
        target_parameters=stacked or None,
        fan_in_fan_out=any(isinstance(pair.part.module, Conv1D) for pair in pairs),
        base_model_name_or_path=getattr(base, "name_or_path", "") or None,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def _short(base: nn.Module, paths: Sequence[str]) -> list[str]:
    """The modules by their own names, as most LoRAs have them, if these name no others."""
    names = {path.rpartition(".")[2] for path in paths}
    every = {path.replace(".base_layer", "") for path, _ in base.named_modules()}
    meant = {path for path in every if path.rpartition(".")[2] in names}
    return sorted(names) if meant == set(paths) else list(paths)


def _proof(
    folder: Path, base: Any, pairs: Sequence[Pair], probe: Tensor, live: Tensor
) -> tuple[float, float, float, float]:
    """Reload on a fresh model that shares the base's tensors; raise unless it adds what is kept."""
    kind, config, state = type(base), base.config, stock_state(base)
    plain = assembled(kind, config, state)
    effect = difference_of(logits_of(plain, probe), live)
    changed = {}
    for pair in pairs:
        key = f"{pair.part.path}.{pair.part.parameter}"
        changed[key] = (state[key].float() + pair.added()).to(state[key])
    expected = logits_of(assembled(kind, config, state | changed), probe)
    try:
        again: Any = PeftModel.from_pretrained(plain, str(folder)).eval()
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise UnsupportedModel(f"PEFT cannot load such a LoRA for this model: {why}") from error
    logits = logits_of(again, probe)
    difference = difference_of(logits, expected)
    if difference > bound_of(expected):
        raise disagreement(again, difference, expected)
    return difference_of(logits, live), effect, difference, bound_of(expected)


def _result(
    target: Path,
    names: Sequence[str],
    parts: Sequence[Part],
    ranks: Sequence[int],
    measured: tuple[float, float, float, float],
) -> LoraResult:
    both = list(zip(parts, ranks, strict=True))
    whole = sum(float(part.gains.double().sum()) for part in parts)
    energies = {
        part.name: float(part.gains[:rank].double().sum() / part.gains.double().sum())
        for part, rank in both
    }
    difference, effect, proof, bound = measured
    return LoraResult(
        folder=str(target),
        experts=tuple(names),
        parameters=sum(part.cost * rank for part, rank in both),
        ranks={part.name: rank for part, rank in both if rank},
        energy=sum(float(part.gains[:rank].double().sum()) for part, rank in both) / whole,
        energies=energies,
        logit_difference=difference,
        effect=effect,
        proof=proof,
        bound=bound,
    )


def _card(result: LoraResult, unfinished: Path, base: Any) -> str:
    from pliant.adapters import fingerprint

    public = fingerprint(base).name
    named = f"base_model: {public}\n" if public else ""
    text = str(result).partition(": ")[2]
    return f"---\nlibrary_name: peft\n{named}tags: [lora]\n---\n\n# {text[0].upper()}{text[1:]}.\n"
