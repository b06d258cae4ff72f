"""PEFT's tuner for singular-value fine-tuning: where experts go, and how they are mixed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from pliant.adapters import Fingerprint, fingerprint
from pliant.adapters.quantized import differentiable
from pliant.anatomy import Anatomy
from pliant.anatomy.roles import Matrix, matrices
from pliant.errors import InvalidInput, PliantError, UnsupportedModel, WrongBase, did_you_mean
from pliant.experts.basis import check_value
from pliant.experts.config import SVFConfig
from pliant.experts.layer import EXPERTS, SVFLayer
from pliant.experts.linear import SVFLinear
from pliant.experts.rows import BASE, Mixture, Rows
from pliant.experts.stacked import ParamWrapper

PATIENCE = 5
"""Seconds before the computation of bases shows its progress."""
SAME_BASIS = 0.02
"""How far check values may be from the saved ones, relative to these, over all matrices."""


class SVFModel(BaseTuner):
    """A model whose projections' singular values are scaled; `get_peft_model` makes it."""

    prefix = "svf_"
    tuner_layer_cls = SVFLayer

    # --- where experts go ------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        config = cast(SVFConfig, peft_config)
        base = fingerprint(model, ignore=EXPERTS)
        if config.fingerprint is not None:
            check_base(config.fingerprint, base)
        if config.target_modules is None and config.target_parameters is None:
            chosen = targets(model, config)
            config.target_modules = {m.path for m in chosen if not m.is_stacked}  # type: ignore[assignment]
            stacked = sorted(f"{m.path}.{m.parameter}" for m in chosen if m.is_stacked)
            config.target_parameters = stacked or None
        config.fingerprint = asdict(base)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(SVFConfig, peft_config)
        if isinstance(target, SVFLayer) and getattr(target, "parameter_name", None) == (
            parameter_name
        ):
            target.update_layer(adapter_name, config)
            return
        layer: nn.Module
        if parameter_name is not None:
            layer = ParamWrapper(target, adapter_name, parameter_name, config)
        else:
            _check_projection(target, current_key)
            layer = SVFLinear(target, adapter_name, config)
            tied = [each for _, each in svf_layers(self.model) if each is not layer]
            first = next((each for each in tied if each._parameter() is layer._parameter()), None)
            if first is not None:
                layer.tie_to(first)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(child, SVFLayer) and not isinstance(new_module, SVFLayer):
            setattr(parent, child_name, new_module)  # unloading
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Put an expert on the model, with its bases; if it does not fit, take it off."""
        try:
            check_name(adapter_name)
        except InvalidInput:
            self.peft_config.pop(adapter_name, None)
            raise
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._prepare_bases(model, adapter_name)
        except PliantError:
            if len(self.peft_config) > 1:
                self.delete_adapter(adapter_name)
            else:
                self.unload()
            raise

    def _prepare_bases(self, model: nn.Module, adapter_name: str) -> None:
        """Compute the bases, or read them, unless the weights are not at hand."""
        for unpacked in differentiable(model):
            unpacked.connect(model)
        config = cast(SVFConfig, self.peft_config[adapter_name])
        indices = _layer_indices(model)
        read = {id(m.module) for m in matrices(Anatomy.of(model)) if m.role == "other"}
        checks: dict[str, float] = {}
        layers = dict(svf_layers(model))
        for path, layer in logging.tqdm(
            layers.items(), desc="singular vectors", delay=PATIENCE, disable=None
        ):
            layer.is_read = id(layer) in read
            layer.layer_index = next((i for p, i in indices if f"{path}.".startswith(p)), None)
            if adapter_name in layer.ranks and not layer._parameter().is_meta:
                basis = layer.ensure_basis()
                if basis.dim() == 2:
                    checks[path] = round(check_value(basis[:, : layer.ranks[adapter_name]]), 4)
        _warn_of_approximations(layers)
        if config.checks is not None:
            check_bases(config.checks, checks)
        config.checks = checks

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        if not isinstance(config, SVFConfig):
            raise InvalidInput(f"{type(config).__name__}: an expert needs a SVFConfig")

    # --- saving ----------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """z alone: the basis follows from the base."""
        every = super()._get_adapter_state_dict(*args, **kwargs)
        return {name: t for name, t in every.items() if not name.endswith("svf_basis")}

    # --- mixing ----------------------------------------------------------------------------------

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """A new expert z = 1 + sum of weight * (z_k - 1); so weights of 0 are the base."""
        if combination_type != "linear":
            raise InvalidInput(
                f"combination_type = {combination_type!r}: experts are mixed linearly, which is "
                "exact, so there is 'linear' alone"
            )
        if len(adapters) != len(weights) or not adapters:
            raise InvalidInput(f"{len(adapters)} experts and {len(weights)} weights: one for each")
        for name in adapters:
            if name not in self.peft_config:
                raise InvalidInput(f"no expert {name!r}{did_you_mean(name, self.peft_config)}")
        if adapter_name in self.peft_config:
            raise InvalidInput(f"there is an expert {adapter_name!r} already: delete it first")
        self.peft_config[adapter_name] = self._joined(adapters)
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for _, layer in svf_layers(self.model):
                if adapter_name in layer.svf_z:
                    _mix_into(layer, adapter_name, adapters, weights)

    def _joined(self, adapters: Sequence[str]) -> SVFConfig:
        """A configuration that covers what each of them adapts."""
        configs = [cast(SVFConfig, self.peft_config[name]) for name in adapters]
        modules = [c.target_modules for c in configs]
        if any(isinstance(m, str) for m in modules):
            if len({str(m) for m in modules}) > 1:
                raise InvalidInput("experts whose target_modules are patterns must share them")
            joined: Any = modules[0]
        else:
            joined = sorted(set().union(*(m or () for m in modules)))
        parameters = set().union(*(c.target_parameters or () for c in configs))
        ranks = [c.rank for c in configs]
        rank = None if None in ranks else max(r for r in ranks if r is not None)
        return replace(
            configs[0],
            target_modules=joined,
            target_parameters=sorted(parameters) or None,
            rank=rank,
            checks=None,
            layers_to_transform=_union([c.layers_to_transform for c in configs]),
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's `adapter_names=`: an expert, or `__base__`, for each row of the batch."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        with self.rows(Rows.of_names(names, [*self.peft_config, BASE])):
            yield

    @contextmanager
    def rows(self, rows: Rows | Sequence[Mixture]) -> Iterator[None]:
        """A mixture (expert -> coefficient) for each row of the batches that run in the block."""
        if not isinstance(rows, Rows):
            rows = Rows.of_mixtures(rows, list(self.peft_config))
        with use_rows(self.model, rows):
            yield


@contextmanager
def use_rows(model: nn.Module | Anatomy, rows: Rows) -> Iterator[None]:
    """The same on a model whose experts were loaded with transformers' `load_adapter`."""
    anatomy = model if isinstance(model, Anatomy) else Anatomy.of(model)
    layers = [layer for _, layer in svf_layers(anatomy.model)]
    notes = [
        module.register_forward_pre_hook(_note_batch(rows), with_kwargs=True)
        for module in (anatomy.model, anatomy.decoder)
    ]
    try:
        for layer in layers:
            layer.use_rows(rows)
        yield
    finally:
        for layer in layers:
            layer.use_rows(None)
        for note in notes:
            note.remove()


def _note_batch(rows: Rows) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = [kwargs.get(name) for name in ("input_ids", "inputs_embeds")]
        tensors = [v for v in (*args[:1], *named) if isinstance(v, Tensor) and v.dim() >= 2]
        if tensors:
            rows.batch = (tensors[0].shape[0], tensors[0].shape[1])

    return note


def svf_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every projection with experts."""
    for path, module in model.named_modules():
        if isinstance(module, SVFLayer):
            yield path.replace(".base_layer", ""), module


def targets(model: nn.Module, config: SVFConfig) -> list[Matrix]:
    """The weights that an expert adapts unless they are named; never a router."""
    roles = {"mlp": ("mlp", "expert"), "attention": ("attention",)}
    anatomy = Anatomy.of(model)
    chosen = [
        matrix
        for matrix in matrices(anatomy)
        if matrix.role != "router"
        and (config.parts == "all" or matrix.role in roles[config.parts])
        and (matrix.is_stacked or _is_projection(matrix.module))
    ]
    if not chosen:
        raise UnsupportedModel(
            f"{type(anatomy.model).__name__} has no projections for parts={config.parts!r}: name "
            "them, SVFConfig(target_modules=[...])"
        )
    return chosen


def _is_projection(module: nn.Module) -> bool:
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    weight: Any = module.weight
    return not weight.dtype.is_floating_point or weight.dim() == 2


def _check_projection(module: nn.Module, path: str) -> None:
    if not _is_projection(module):
        raise UnsupportedModel(
            f"{path} is a {type(module).__name__}: experts act on Linear and Conv1D projections, "
            "and on the stacked weights of mixtures (target_parameters)"
        )


def _layer_indices(model: nn.Module) -> list[tuple[str, int]]:
    """The path of each layer in the model, with its index."""
    anatomy = Anatomy.of(model)
    paths = {id(module): path for path, module in model.named_modules()}
    return [(f"{paths[id(layer)]}.", i) for i, layer in enumerate(anatomy.layers)]


def _union(layers: Sequence[list[int] | int | None]) -> list[int] | None:
    """The layers that any of several configurations adapts; None means all."""
    if any(each is None for each in layers):
        return None
    return sorted({i for each in layers for i in (each if isinstance(each, list) else [each])})  # type: ignore[misc]


def _mix_into(
    layer: Any, adapter_name: str, adapters: Sequence[str], weights: Sequence[float]
) -> None:
    target = layer.svf_z[adapter_name].weight
    target.zero_()
    for name, weight in zip(adapters, weights, strict=True):
        if name in layer.svf_z:
            own = layer.svf_z[name].weight
            target[..., : own.shape[-1]] += weight * own


def _warn_of_approximations(layers: Mapping[str, Any]) -> None:
    missing = {path: layer.missing for path, layer in layers.items() if layer.missing > 0}
    if missing:
        worst = max(missing, key=lambda path: missing[path])
        warnings.warn(
            f"{len(missing)} matrices are too large to decompose exactly (exact_limit); an expert "
            f"cannot change up to {missing[worst]:.1%} of a matrix's energy ({worst})",
            stacklevel=2,
        )


def check_name(name: str) -> None:
    """Refuse a name that a `ModuleDict` cannot hold."""
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise InvalidInput(
            f"{name!r} cannot be the name of an expert: use one without dots that is no attribute "
            "of torch's ModuleDict"
        )


def check_base(saved: dict[str, Any], here: Fingerprint) -> None:
    trained_on = Fingerprint(**saved)
    if differences := trained_on.differences(here):
        raise WrongBase(
            f"the expert was trained on another base ({trained_on.name or trained_on.model}): "
            f"{differences}. Load it on its own base, or pass a config with fingerprint=None"
        )


def check_bases(saved: Mapping[str, float], here: Mapping[str, float]) -> None:
    """Refuse weights that were rounded otherwise: their singular vectors are others.

    Of many vectors with close singular values, a few may be turned on other hardware.
    """
    common = {path: (saved[path], here[path]) for path in saved if path in here}
    if not common:
        return
    values, others = torch.tensor(list(common.values()), dtype=torch.float64).T
    far = (values - others).abs()
    near = far.norm() <= SAME_BASIS * values.norm()
    if not (near and values.isfinite().all()):
        raise WrongBase(
            f"the singular vectors of {list(common)[int(far.argmax())]} and other matrices are not "
            "those that the expert was trained with: load the base in the same dtype, or pass a "
            "config with checks=None"
        )


def _register() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if "SVF" not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="svf", config_cls=SVFConfig, model_cls=SVFModel)


_register()
