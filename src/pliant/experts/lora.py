"""An expert as a LoRA in PEFT's format, which needs no Pliant: for vLLM, and for everything else.

    result = to_lora(model, "math-lora", rank=16)
    PeftModel.from_pretrained(base, "math-lora")

What an expert adds to a weight, left diag(d) right, is its own singular value decomposition: the
ranks with the largest |s_i d_i| are the best ones, and no decomposition is computed here. A budget
of numbers is spent where a rank keeps the most energy for each number, over all weights.

The folder is reloaded by PEFT on a fresh model, and compared, before it gets its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pliant.adapters.fingerprint import is_packed
from pliant.adapters.stock import (
    PROBE,
    assembled,
    difference_of,
    disagreement,
    logits_of,
)
from pliant.anatomy import Anatomy
from pliant.anatomy.find import unwrap
from pliant.anatomy.modes import eval_mode
from pliant.anatomy.trial import is_full_precision, trial_ids
from pliant.errors import InvalidInput, UnsupportedModel, check_whole
from pliant.experts.dequantised import stock_config
from pliant.experts.expert import Expert
from pliant.experts.export import check_leaves, chosen, merged_weights, on_its_base, stock_state
from pliant.experts.folder import CARD, PREFIX, WEIGHTS
from pliant.experts.low_rank import Pair, Part, best_ranks, parts_of, same_ranks, without
from pliant.files import check_new, new_folder
from pliant.loading import public_name

ADAPTER = "default"
SAME = 1e-4
"""How close what PEFT adds must be to what was written, relative to it."""
ROUNDING = 1e-3
"""The same for logits, relative to the largest: a LoRA multiplies in another order than a weight
that it was added to. 3e-5 on SmolLM2-135M."""


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
            f"{self.folder}: a LoRA of {self.parameters:,} parameters ({rank} in {len(self.ranks)} "
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
    exclude: Sequence[str] = (),
) -> LoraResult:
    """Write a model's active experts, or these, to a new folder as one LoRA.

    Give `rank`, the same for every weight, or `budget`, how many parameters it may have in total.
    The model may be an expert's folder: then `base` is loaded (left out: the one that it names).
    `exclude` names modules that are left out, as `out_proj` or a part of a path.
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
        parts = parts_of(stock)
        usable = without(parts, exclude)
        ranks = same_ranks(usable, rank) if rank is not None else best_ranks(usable, budget or 0)
        pairs = [part.pair(r, stock.dtype) for part, r in zip(usable, ranks, strict=True) if r]
        probe = trial_ids(Anatomy.of(stock), PROBE)
        live = logits_of(stock, probe)
        with new_folder(target) as unfinished:
            _write(unfinished, stock, pairs)
            measured = _proof(unfinished, stock, pairs, probe, live)
            kept = {part.name: r for part, r in zip(usable, ranks, strict=True) if r}
            result = _result(target, names, parts, kept, measured)
            (unfinished / CARD).write_text(_card(result, unfinished, stock), encoding="utf-8")
    return result


def _check_size(rank: int | None, budget: int | None) -> None:
    if (rank is None) == (budget is None):
        raise InvalidInput("give rank, the same for every weight, or budget, parameters in total")
    for name, value in (("rank", rank), ("budget", budget)):
        if value is not None:
            check_whole(name, value, 1)


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
        base_model_name_or_path=public_name(getattr(base, "name_or_path", "") or "") or None,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def _short(base: nn.Module, paths: Sequence[str]) -> list[str]:
    """The modules by their own names, as most LoRAs have them, if these name no others."""
    names = {path.rpartition(".")[2] for path in paths}
    every = {path.replace(".base_layer", "") for path, _ in base.named_modules()}
    meant = {path for path in every if path.rpartition(".")[2] in names}
    return sorted(names) if meant == set(paths) else list(paths)


@torch.no_grad()
def _proof(folder: Path, base: Any, pairs: Sequence[Pair], probe: Tensor, live: Tensor) -> Measured:
    """Reload on a fresh model that shares the base's tensors; raise unless it adds what is kept.

    A base in half precision is compared in fp32, where a difference is one of the LoRA; a quantised
    one as the model of its dequantised weights.
    """
    kind, config, state = type(base), stock_config(base), stock_state(base)
    if not is_full_precision(base) or is_packed(base):
        state = {k: t.float() if t.is_floating_point() else t for k, t in state.items()}
        live = logits_of(assembled(kind, config, state | merged_weights(base, True)), probe)
    plain = assembled(kind, config, state)
    with _calls(plain, pairs):
        effect = difference_of(logits_of(plain, probe), live)
    changed = {}
    for pair in pairs:
        key = f"{pair.part.path}.{pair.part.parameter}"
        changed[key] = state[key] + pair.added().to(state[key])
    expected = logits_of(assembled(kind, config, state | changed), probe)
    try:
        again: Any = PeftModel.from_pretrained(plain, str(folder)).eval()
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise UnsupportedModel(
            f"PEFT cannot load such a LoRA for this model; leave out what it names with exclude. "
            f"It says: {why}"
        ) from error
    _check_loaded(again, pairs)
    logits = logits_of(again, probe)
    difference = difference_of(logits, expected)
    if difference > ROUNDING:
        raise disagreement(again, difference, expected, ROUNDING)
    return Measured(difference_of(logits, live), effect, difference, ROUNDING)


@contextmanager
def _calls(plain: nn.Module, pairs: Sequence[Pair]) -> Iterator[None]:
    """Refuse a module whose weight the model reads without calling it, where a LoRA is ignored."""
    paths = {pair.part.path for pair in pairs if pair.part.is_read}
    called: set[str] = set()
    hooks = [
        plain.get_submodule(path).register_forward_pre_hook(
            lambda m, a, path=path: called.add(path)
        )
        for path in paths
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if ignored := sorted({path.rpartition(".")[2] for path in paths - called}):
        raise UnsupportedModel(
            f"a LoRA has no effect on {', '.join(ignored)}, whose weights this model reads without "
            f"calling the modules: leave them out, exclude={ignored}. Nothing was written"
        )


def _check_loaded(model: Any, pairs: Sequence[Pair]) -> None:
    """Whether PEFT adds the same to the same weights."""
    missing = {(pair.part.path, pair.part.parameter): pair for pair in pairs}
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            name = getattr(layer, "parameter_name", "weight")
            pair = missing.pop((path.replace(".base_layer", ""), name), None)
            if pair is None:
                raise UnsupportedModel(f"PEFT adapts {path}, too, where the expert changes nothing")
            ours, theirs = pair.added(), cast(Tensor, layer.get_delta_weight(ADAPTER))
            if (theirs.to(ours) - ours).norm() > SAME * ours.norm():
                raise UnsupportedModel(f"PEFT adds something else to {path} than was written")
    if missing:
        raise UnsupportedModel(f"PEFT does not adapt {next(iter(missing))[0]}")


@dataclass(frozen=True)
class Measured:
    """Differences of logits: see `LoraResult`."""

    logit_difference: float
    effect: float
    proof: float
    bound: float


def _result(
    target: Path,
    names: Sequence[str],
    parts: Sequence[Part],
    ranks: dict[str, int],
    measured: Measured,
) -> LoraResult:
    whole = {part.name: float(part.gains.double().sum()) for part in parts}
    own = {p.name: float(p.gains[: ranks.get(p.name, 0)].double().sum()) for p in parts}
    return LoraResult(
        folder=str(target),
        experts=tuple(names),
        parameters=sum(part.cost * ranks.get(part.name, 0) for part in parts),
        ranks=ranks,
        energy=sum(own.values()) / sum(whole.values()),
        energies={name: own[name] / whole[name] for name in whole},
        **asdict(measured),
    )


def _card(result: LoraResult, unfinished: Path, base: Any) -> str:
    from pliant.adapters import fingerprint

    public = fingerprint(base).name
    named = f"base_model: {public}\n" if public else ""
    text = str(result).partition(": ")[2]
    return f"---\nlibrary_name: peft\n{named}tags: [lora]\n---\n\n# {text[0].upper()}{text[1:]}.\n"
