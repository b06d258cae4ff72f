"""Merge experts into a stock checkpoint that holds no trace of Pliant or PEFT, proven equal.

    merge(model, "math-model", tokenizer)          # the active experts of a PeftModel
    merge("math", "math-model", base="nano-s")     # an expert's folder, on its base
    AutoModelForCausalLM.from_pretrained("math-model")

The copy is written to a temporary folder, reloaded with plain transformers, compared with the live
model, whose experts are merged meanwhile, and only then renamed to its target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from pliant.adapters import attached
from pliant.adapters.fingerprint import is_packed
from pliant.adapters.stock import (
    PROBE,
    SHARD_SIZE,
    assembled,
    bound_of,
    bytes_of,
    check_exportable,
    difference_of,
    disagreement,
    logits_of,
    proof,
    save,
)
from pliant.anatomy import Anatomy
from pliant.anatomy.find import unwrap
from pliant.anatomy.modes import eval_mode
from pliant.anatomy.trial import trial_ids
from pliant.errors import InvalidInput, UnsupportedModel, did_you_mean
from pliant.experts.dequantised import (
    LIVE_BOUND,
    check_dequantisable,
    dequantised_state,
    stock_config,
)
from pliant.experts.expert import Expert
from pliant.experts.folded import folded
from pliant.experts.folder import base_place_of
from pliant.experts.layer import SVFLayer
from pliant.experts.model import svf_layers
from pliant.files import check_new, new_folder


@dataclass(frozen=True)
class MergeResult:
    """The merged model, and how closely it agrees with the live one."""

    folder: str
    architecture: str
    experts: tuple[str, ...]
    matrices: int
    """How many weights are others than the base's."""
    difference: float
    """The largest between logits of the reloaded copy and of the live model, relative to the
    largest logit."""
    bound: float
    dtype: str

    def as_dict(self) -> dict[str, Any]:
        """All but the folder, which depends on the machine and not on the model."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    def __str__(self) -> str:
        return (
            f"{self.folder}: a stock {self.architecture} with {' + '.join(self.experts)} in "
            f"{self.matrices} weights, whose logits are within {self.difference:.1e} of the live "
            f"model's (allowed: {self.bound:g})"
        )


def merge(
    model: nn.Module | str | Path,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    base: str | Path | None = None,
    experts: Sequence[str] | None = None,
    max_shard_size: str = SHARD_SIZE,
) -> MergeResult:
    """Write a model with its active experts, or with these, to a new folder as a stock checkpoint.

    The model may be an expert's folder: then `base` is loaded (left out: the one that the expert
    names), with its tokenizer.
    """
    target = Path(folder).expanduser()
    check_new(target)
    bytes_of(max_shard_size)
    if isinstance(model, str | Path):
        model, tokenizer = on_its_base(Expert.load(model), base, tokenizer)
    elif base is not None:
        raise InvalidInput("base goes with an expert's folder; a model has its base")
    stock: Any = unwrap(model)
    check_leaves(stock)
    with chosen(stock, experts) as names, eval_mode(stock):
        probe = trial_ids(Anatomy.of(stock), PROBE)
        merged = merged_weights(stock)
        copy = assembled(type(stock), stock_config(stock), stock_state(stock) | merged)
        live, bound, difference = _live(stock, copy, probe)
        with new_folder(target) as unfinished:
            save(copy, stock, tokenizer, unfinished, max_shard_size)
            difference = max(difference, proof(unfinished, stock, probe, live))
    return MergeResult(
        folder=str(target),
        architecture=type(stock).__name__,
        experts=tuple(names),
        matrices=len(merged),
        difference=difference,
        bound=bound,
        dtype=str(stock.dtype).removeprefix("torch."),
    )


def on_its_base(
    expert: Expert, base: str | Path | None = None, tokenizer: Any = None, **loading: Any
) -> tuple[nn.Module, Any]:
    """The expert on its base, and the base's tokenizer; None if it has none."""
    from pliant.errors import ModelNotFound
    from pliant.loading import load_model, load_tokenizer, not_computed_here

    name = base or base_place_of(expert.settings)
    if not name:
        raise InvalidInput(
            "the expert does not say what its base is: name it, --base NAME (base= in Python)"
        )
    with not_computed_here():
        plain = load_model(name, **loading)
    if tokenizer is None:
        try:
            tokenizer = load_tokenizer(name)
        except ModelNotFound:  # a model may come without one
            tokenizer = None
    return expert.apply(plain), tokenizer


# --- checks --------------------------------------------------------------------------------------


def check_leaves(base: Any) -> None:
    """Refuse what cannot leave as numbers, before work begins."""
    if is_packed(base):
        check_dequantisable(base)
    else:
        check_exportable(base)
    for name, adapter in attached(base).items():
        if adapter.why_no_export:
            raise UnsupportedModel(
                f"{name} is attached, and {adapter.why_no_export}: detach it to export the rest"
            )
    layers = [layer for _, layer in svf_layers(base)]
    if not layers:
        raise InvalidInput("the model has no experts: put one on it first, expert.apply(model)")
    for path, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, SVFLayer):
            raise UnsupportedModel(
                f"{path} has another method's adapter ({type(module).__name__}): merge it first "
                "(merge_and_unload)"
            )
    _check_shared(base, layers)


def _check_shared(base: nn.Module, layers: Sequence[Any]) -> None:
    """A weight that a layer without experts has, too, cannot change for one of them alone."""
    adapted = {id(layer._parameter()) for layer in layers}
    inside = {id(layer.base()) for layer in layers}
    for path, module in base.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in adapted and id(module) not in inside:
                raise UnsupportedModel(
                    f"{path}.{name} is also the weight of a projection that an expert changes, "
                    "and a stock checkpoint has one weight for both: leave that projection out"
                )


@contextmanager
def chosen(base: Any, experts: Sequence[str] | None) -> Iterator[list[str]]:
    """These experts as the active ones; None for those that are."""
    layers = [layer for _, layer in svf_layers(base)]
    known = sorted({name for layer in layers for name in layer.svf_z})
    for name in experts or ():
        if name not in known:
            raise InvalidInput(f"no expert {name!r}{did_you_mean(name, known)}")
    before = [(layer, layer.active_adapters, _trainable(layer)) for layer in layers]
    if any(layer.merged for layer in layers):
        raise InvalidInput("experts are merged into the weights: unmerge them first")
    if any(layer.disable_adapters for layer in layers):
        raise InvalidInput("the experts are disabled: enable them to export one")
    try:
        if experts is not None:
            for layer in layers:
                layer.set_adapter([name for name in experts if name in layer.svf_z])
        own = {name for layer in layers for name in layer.active_adapters}
        names = [name for name in known if name in own]
        if not names:
            raise InvalidInput(f"no expert is active{did_you_mean('', known)}: name one")
        yield names
    finally:
        for layer, active, trainable in before:
            layer.set_adapter(active)
            for parameter, state in trainable:
                parameter.requires_grad_(state)


def _live(base: Any, copy: Any, probe: Tensor) -> tuple[Tensor, float, float]:
    """The logits that the checkpoint must give, what may differ from the live model's, and what
    does already: a quantised model has no experts in its weights, and rounds otherwise."""
    if not is_packed(base):
        with _as_merged(base):
            live = logits_of(base, probe)
        return live, bound_of(live), 0.0
    live, own = logits_of(base, probe), logits_of(copy, probe)
    difference = difference_of(own, live)
    if difference > LIVE_BOUND:
        raise disagreement(copy, difference, live, LIVE_BOUND)
    return own, LIVE_BOUND, difference


@contextmanager
def _as_merged(base: Any) -> Iterator[None]:
    """The active experts in the weights, for a while: unmerged, they round otherwise, by 3e-5 of
    the largest logit in fp32 on SmolLM2-135M and by more than the bound in bf16."""
    layers = [layer for _, layer in svf_layers(base)]
    try:
        for layer in layers:
            layer.merge(adapter_names=list(layer.active_adapters))
        yield
    finally:
        for layer in layers:
            if layer.merged:
                layer.unmerge()


def _trainable(layer: Any) -> list[tuple[nn.Parameter, bool]]:
    return [(p, p.requires_grad) for p in layer.svf_z.parameters()]


# --- weights -------------------------------------------------------------------------------------


@torch.no_grad()
def merged_weights(base: Any, precise: bool = False) -> dict[str, Tensor]:
    """The weights with the active experts in them, by their names in the stock model; in their own
    dtype, or in fp32 or better."""
    made: dict[int, Tensor] = {}
    merged: dict[str, Tensor] = {}
    for path, layer in svf_layers(base):
        change = layer.change_of(layer.active_adapters)
        if change is None:
            continue
        parameter = layer._parameter()
        if id(parameter) not in made:  # tied weights stay one tensor
            weight = layer.own_weight().detach()
            if layer.is_quantised:
                weight = weight.to(base.dtype)
            if precise:
                weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            weight = folded(weight, layer.vectors_for(change), change)
            made[id(parameter)] = layer._in_place(weight).contiguous()
        name = getattr(layer, "parameter_name", "weight")
        merged[f"{path}.{name}"] = made[id(parameter)]
    return merged


def stock_state(base: nn.Module) -> dict[str, Tensor]:
    """The base's own tensors under the names that they had without PEFT, dequantised."""
    whole = [
        (f"{path}.", module)
        for path, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    ]
    state = {}
    for key, tensor in base.state_dict().items():
        wrapper = next(((p, m) for p, m in whole if key.startswith(p)), None)
        if wrapper is not None:
            path, module = wrapper
            active = f"modules_to_save.{module.active_adapter}."
            used = active if module.active_adapter in module.modules_to_save else "original_module."
            if not key.startswith(path + used):
                continue
            key = path + key.removeprefix(path + used)
        if ".svf_z." in key or key.endswith(".svf_basis"):
            continue
        state[key.replace(".base_layer", "")] = tensor
    return dequantised_state(base, state) if is_packed(base) else state
