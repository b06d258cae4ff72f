"""An expert is a value: loaded, saved, added, scaled, compared, and put on a model.

    math, code = Expert.load("math"), Expert.load("code")
    (math + 0.5 * code).save("both")
    model = (-math).apply(base, "no-math")

What is added is d = z - 1, so `0 * math` is the base. The folder is PEFT's: `PeftModel` loads what
this saves, and the other way round.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from numbers import Real
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from pliant.adapters import Fingerprint
from pliant.adapters.fingerprint import LAYER
from pliant.adapters.saving import gathered
from pliant.anatomy.find import unwrap
from pliant.errors import AdapterError, InvalidInput, PliantError, WrongBase, did_you_mean
from pliant.experts.config import SVFConfig
from pliant.experts.folder import (
    as_saved,
    base_name_of,
    check_only_z,
    read_changes,
    read_settings,
    settings_of,
    write,
)
from pliant.experts.layer import SVFLayer
from pliant.experts.model import check_bases, check_name

Scales = Mapping[str, Tensor]
"""The singular values of each matrix, by its path: see `singular_values`."""


@dataclass(frozen=True, eq=False, repr=False)
class Expert:
    """The change d = z - 1 of each singular value, and what PEFT's config says of it."""

    changes: Mapping[str, Tensor]
    """By the path of the projection, in fp32: (rank,), or (experts, rank) for stacked weights,
    whose paths are those of PEFT's nested wrappers."""
    settings: Mapping[str, Any]
    """The content of `adapter_config.json`."""

    @classmethod
    def load(cls, folder: str | Path) -> Expert:
        """From a folder that `save`, or PEFT's `save_pretrained`, wrote."""
        place = Path(folder).expanduser()
        settings = read_settings(place)
        return cls(read_changes(place), settings)

    @classmethod
    def of(cls, model: nn.Module, name: str = "default") -> Expert:
        """A copy of the expert that a model has under this name."""
        configs: Mapping[str, PeftConfig] = getattr(model, "peft_config", {})
        if name not in configs:
            raise InvalidInput(f"the model has no expert {name!r}{did_you_mean(name, configs)}")
        config = configs[name]
        if not isinstance(config, SVFConfig):
            raise InvalidInput(f"{name!r} is a {type(config).__name__}'s adapter, and no expert")
        settings = settings_of(config, unwrap(model))
        check_only_z(name, settings)
        return cls({path: _copy(d) for path, d in _changes_on(model, name)}, settings)

    def save(self, folder: str | Path) -> None:
        """Write PEFT's files, each completely or not at all."""
        write(Path(folder).expanduser(), self.changes, self.settings, self.card())

    def apply(
        self, model: nn.Module, name: str = "default", *, trainable: bool = False
    ) -> PeftModel:
        """Put the expert on a model under this name, or in the place of one with the same matrices.

        A model without PEFT is wrapped; the PeftModel is returned. An expert that is added to
        others becomes active with `set_adapter`. One that does not fit leaves the model as it was.
        """
        check_name(name)
        config = cast(SVFConfig, PeftConfig.from_peft_type(**self.settings))
        config.inference_mode = not trainable
        if isinstance(model, PeftModel) and name in model.peft_config:
            self._check_same_matrices(model, name)
            self._write_to(model, name)
            return model
        required = {p: p.requires_grad for p in model.parameters()}
        try:
            peft = _with_new(model, config, name)
            self._write_to(peft, name)
        except PliantError:
            for parameter, was in required.items():
                parameter.requires_grad_(was)
            raise
        return peft

    # --- what it is ------------------------------------------------------------------------------

    @property
    def base(self) -> Fingerprint | None:
        """The base that it was trained on; None if that was not noted."""
        saved = self.settings.get("fingerprint")
        return None if saved is None else Fingerprint(**saved)

    @property
    def base_name(self) -> str:
        """The name or folder from which its base can be loaded; empty if that is unknown."""
        return base_name_of(self.settings)

    @property
    def numbers(self) -> int:
        """How many parameters were trained."""
        return sum(d.numel() for d in self.changes.values())

    def __str__(self) -> str:
        base = self.base_name or "an unknown base"
        return (
            f"an expert of {base}: {self.numbers:,} parameters in {len(self.changes)} matrices, "
            f"norm {self.norm():.3g}"
        )

    __repr__ = __str__

    # --- algebra ---------------------------------------------------------------------------------

    __array_ufunc__ = None  # so that a number of numpy's leaves the product to us

    def __add__(self, other: object) -> Expert:
        if isinstance(other, int) and other == 0:  # where `sum` begins
            return self
        return self._plus(other, 1.0) if isinstance(other, Expert) else NotImplemented

    __radd__ = __add__

    def __sub__(self, other: object) -> Expert:
        return self._plus(other, -1.0) if isinstance(other, Expert) else NotImplemented

    def __mul__(self, factor: object) -> Expert:
        if not isinstance(factor, Real) or isinstance(factor, bool):
            return NotImplemented
        if not isfinite(float(factor)):
            raise InvalidInput(f"an expert times {factor}: give a finite number")
        scaled = {path: float(factor) * d for path, d in self.changes.items()}
        return Expert(scaled, self.settings)

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> Expert:
        if not isinstance(divisor, Real) or isinstance(divisor, bool):
            return NotImplemented
        if divisor == 0:
            raise InvalidInput("an expert divided by 0")
        return self * (1 / float(divisor))

    def __neg__(self) -> Expert:
        return self * -1.0

    def __eq__(self, other: object) -> bool:
        """Whether both change the same base in the same way."""
        if not isinstance(other, Expert):
            return NotImplemented
        try:
            difference = self._plus(other, -1.0)
        except (InvalidInput, WrongBase):
            return False
        return not any(bool(d.any()) for d in difference.changes.values())

    __hash__ = None  # type: ignore[assignment]

    def norm(self, scales: Scales | None = None) -> float:
        """Of d; with the matrices' singular values, of all changes of the weights together."""
        return sqrt(max(0.0, self._dot(self, scales)))

    def distance(self, other: Expert, scales: Scales | None = None) -> float:
        """The norm of the difference."""
        return (self - other).norm(scales)

    def cosine(self, other: Expert, scales: Scales | None = None) -> float:
        """1 for the same direction, -1 for the opposite; 0 if one of them changes nothing."""
        check_compatible(self, other)
        lengths = self.norm(scales) * other.norm(scales)
        return self._dot(other, scales) / lengths if lengths else 0.0

    def _dot(self, other: Expert, scales: Scales | None) -> float:
        total = 0.0
        for path in self.changes.keys() & other.changes.keys():
            own, its = _aligned(self.changes[path].double(), other.changes[path].double())
            weight = scale_of(path, own, scales)
            total += float((own * its * weight.square()).sum())
        return total

    def _plus(self, other: Expert, factor: float) -> Expert:
        check_compatible(self, other)
        changes = dict(self.changes)
        for path, d in other.changes.items():
            own, its = _aligned(changes.get(path, torch.zeros_like(d)), d)
            changes[path] = own + factor * its
        return Expert(changes, _joined_settings(self, other))

    # --- on a model ------------------------------------------------------------------------------

    def _check_same_matrices(self, model: PeftModel, name: str) -> None:
        if not isinstance(model.peft_config[name], SVFConfig):
            raise InvalidInput(f"{name!r} is another method's adapter: choose another name")
        here = {path: d.shape for path, d in _changes_on(model, name)}
        if here != {path: d.shape for path, d in self.changes.items()}:
            raise InvalidInput(
                f"the model has another expert {name!r}, of other matrices or ranks: delete it "
                "first (delete_adapter), or choose another name"
            )
        there = Expert.of(model, name)
        check_compatible(self, there)

    @torch.no_grad()
    def _write_to(self, model: PeftModel, name: str) -> None:
        here = {path: list(d.shape) for path, d in _changes_on(model, name)}
        own = {path: list(d.shape) for path, d in self.changes.items()}
        if odd := sorted(p for p in here.keys() | own.keys() if here.get(p) != own.get(p)):
            if len(model.peft_config) > 1:
                model.delete_adapter(name)
            else:
                model.unload()
            ours, theirs = (shapes.get(odd[0], "no") for shapes in (own, here))
            raise AdapterError(f"{odd[0]}: the expert has {ours} numbers, the model {theirs}")
        set_peft_model_state_dict(model, as_saved(self.changes), adapter_name=name)

    def card(self) -> str:
        """The model card, README.md; a base without a public name is not named."""
        public = "" if self.base is None else self.base.name
        named = f"base_model: {public}\n" if public else ""
        return (
            f"---\nlibrary_name: peft\n{named}tags: [pliant, svf]\n---\n\n# A singular-value "
            f"expert\n\n{self.numbers:,} parameters that scale the singular values of "
            f"{len(self.changes)} weights{f' of {public}' if public else ''}.\n\n"
            "```python\nimport pliant.experts\nfrom peft import PeftModel\n\n"
            'model = PeftModel.from_pretrained(base, "this-folder")\n```\n'
        )


def _with_new(model: nn.Module, config: SVFConfig, name: str) -> PeftModel:
    """The model, wrapped if it was not, with an expert of zeros."""
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            return model
        training = model.training
        peft = get_peft_model(cast(Any, model), config, adapter_name=name)
    except NoMatchingPeftModuleError as error:
        raise AdapterError(f"the model has no matrix that the expert changes: {error}") from error
    peft.train(training)
    return cast(PeftModel, peft)


def check_compatible(a: Expert, b: Expert) -> None:
    """Refuse two experts whose numbers belong to different singular vectors."""
    if a.base is not None and b.base is not None and (why := a.base.differences(b.base)):
        raise WrongBase(f"the two experts were trained on different bases: {why}")
    common = a.changes.keys() & b.changes.keys()
    for path in common:
        ours, theirs = a.changes[path].shape, b.changes[path].shape
        if ours[:-1] != theirs[:-1]:
            raise InvalidInput(
                f"{path}: one expert has {list(ours)} numbers, the other {list(theirs)}"
            )
    _check_ranks(a, b, common)
    stacks = [frozenset(e.settings.get("target_parameters") or ()) for e in (a, b)]
    if all(stacks) and stacks[0] != stacks[1]:
        odd = sorted(stacks[0] ^ stacks[1])
        raise InvalidInput(
            f"only one of the experts adapts the stacked weight {odd[0]}: such experts can be "
            "combined if both adapt the same ones"
        )


def _check_ranks(a: Expert, b: Expert, common: set[str]) -> None:
    """Fewer exact vectors are the first of more of them; approximate ones are others, and those of
    one rank have values to compare."""
    same = {p for p in common if a.changes[p].shape == b.changes[p].shape}
    for path in common - same:
        side, limit = _smaller_side(a, path), a.settings.get("exact_limit") or 0
        if side > limit:
            raise InvalidInput(
                f"{path}: the experts have {a.changes[path].shape[-1]} and "
                f"{b.changes[path].shape[-1]} numbers for singular vectors that were approximated "
                f"(its smaller side is {side:,}, above exact_limit = {limit:,}): only experts of "
                "one rank can be combined there"
            )
    checks = [
        {p: v for p, v in (e.settings.get("checks") or {}).items() if p in same} for e in (a, b)
    ]
    check_bases(*checks)


def scale_of(path: str, change: Tensor, scales: Scales | None) -> Tensor:
    """The singular values for a matrix's d, as many as it has; ones without `scales`."""
    if scales is None:
        return torch.ones_like(change)
    if path not in scales or scales[path].shape[-1] < change.shape[-1]:
        raise InvalidInput(f"no singular values for {path}: use singular_values(model) of its base")
    return scales[path].to(change)[..., : change.shape[-1]]


def layers_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with experts under PEFT's own paths, which tell the stacked weights apart."""
    for path, module in unwrap(model).named_modules():
        if isinstance(module, SVFLayer):
            yield path, module


def _changes_on(model: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    for path, layer in layers_of(model):
        if name in layer.svf_z:
            yield path, layer.changes()[name]


def _copy(change: Tensor) -> Tensor:
    return gathered(change.detach()).to("cpu", torch.float32, copy=True)


def _aligned(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both with as many numbers: what an expert does not change it changes by 0."""
    size = max(a.shape[-1], b.shape[-1])
    ours, theirs = (nn.functional.pad(d, (0, size - d.shape[-1])) for d in (a, b))
    return ours, theirs


def _smaller_side(expert: Expert, path: str) -> int:
    """Of a matrix, from the shapes that the base's fingerprint notes; 0 if it does not."""
    pattern = LAYER.sub("*", f"{path}.weight") + " ["
    shapes = {} if expert.base is None else expert.base.shapes
    own = [json.loads(name[len(pattern) - 1 :]) for name in shapes if name.startswith(pattern)]
    return max((min(shape[-2:]) for shape in own), default=0)


# --- settings ------------------------------------------------------------------------------------


def _joined_settings(a: Expert, b: Expert) -> dict[str, Any]:
    """What covers the matrices of both."""
    joined = dict(a.settings)
    ranks = [e.settings.get("rank") for e in (a, b)]
    joined["rank"] = None if None in ranks else max(cast(list[int], ranks))
    joined["checks"] = _joined_checks(a, b)
    if a.changes.keys() == b.changes.keys():
        return joined
    both = {**a.changes, **b.changes}
    joined["target_modules"] = sorted(path for path, d in both.items() if d.dim() == 1)
    stacks = [e.settings.get("target_parameters") for e in (a, b)]
    joined["target_parameters"] = next((each for each in stacks if each), None)
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        joined[name] = None
    return joined


def _joined_checks(a: Expert, b: Expert) -> dict[str, float] | None:
    """Of each matrix, those of the expert with more singular vectors."""
    ours, theirs = a.settings.get("checks"), b.settings.get("checks")
    if ours is None or theirs is None:
        return None
    joined = dict(ours)
    for path, value in theirs.items():
        if path not in a.changes or b.changes[path].shape[-1] > a.changes[path].shape[-1]:
            joined[path] = value
    return joined
