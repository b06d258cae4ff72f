"""What a user may set of a singular-value expert, as a configuration of PEFT."""

from __future__ import annotations

import re
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig
from peft.utils import PeftType

from pliant.adapters.local_bases import note_place
from pliant.errors import InvalidInput, check_choice, check_whole, named_settings
from pliant.loading import public_name

Parts = Literal["all", "mlp", "attention"]
Form = Literal["auto", "delta", "folded"]
TYPE = "SVF"


def _extend_peft_types() -> PeftType:
    """A member of PEFT's enumeration, which has no other way to take in a method."""
    if TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, TYPE)
        member._name_, member._value_ = TYPE, TYPE
        setattr(PeftType, TYPE, member)
        PeftType._member_map_[TYPE] = member
        PeftType._member_names_.append(TYPE)
        PeftType._value2member_map_[TYPE] = member
    return PeftType(TYPE)


SVF = _extend_peft_types()


@named_settings
@dataclass
class SVFConfig(PeftConfig):
    """Singular-value fine-tuning: W = U diag(s) V^T becomes U diag(s z) V^T.

    Only z is trained, stored as d = z - 1: one number for each singular value.
    """

    parts: Parts = field(default="all", metadata={"help": "which projections, if not named"})
    """The projections that are adapted, if `target_modules` names none: of the MLPs, of attention,
    or all."""
    rank: int | None = field(default=None, metadata={"help": "how many singular values"})
    """The largest singular values of each matrix that may change; None means all."""
    form: Form = field(default="auto", metadata={"help": "auto, delta or folded"})
    """`folded` keeps a second copy of each weight with the expert in it, made anew when the expert
    changes; `delta` adds the expert's effect to each call. `auto` folds what is being trained."""
    exact_limit: int = field(default=8192, metadata={"help": "largest side decomposed exactly"})
    """A matrix whose smaller side is larger is decomposed approximately."""
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "by name"})
    """Names or a pattern of modules, as in PEFT; None leaves the choice to `parts`."""
    target_parameters: list[str] | None = field(default=None, metadata={"help": "by name"})
    """Names of stacked weights of mixtures; None leaves the choice to `parts`."""
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "by name"})
    """Modules that are left alone."""
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "indices"})
    """The layers that are adapted, if `target_modules` is a list; None means all."""
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "their list"})
    """The name of the list of layers, if it is an unusual one."""
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "trained besides"})
    """Modules that are trained and saved as a whole besides."""
    fingerprint: dict[str, Any] | None = field(default=None, metadata={"help": "of the base"})
    """Identifies the base; set when the expert is made, compared when it is loaded. None skips the
    comparison."""
    checks: dict[str, float] | None = field(default=None, metadata={"help": "of the bases"})
    """A number for each matrix that depends on its singular vectors; set and compared likewise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SVF
        check_choice("parts", self.parts, get_args(Parts))
        check_choice("form", self.form, get_args(Form))
        if self.rank is not None:
            check_whole("rank", self.rank, 1)
        check_whole("exact_limit", self.exact_limit, 1)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.layers_to_transform, int) and self.layers_to_transform < 0:
            raise InvalidInput(f"layers_to_transform = {self.layers_to_transform}: count from 0")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            _check_pattern(name, getattr(self, name))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT does, but name the base only if anybody can load it: a path may be private."""
        public = copy(self)
        public.base_model_name_or_path = public_name(self.base_model_name_or_path or "") or None
        note_place(self.fingerprint or {}, self.base_model_name_or_path)
        super(SVFConfig, public).save_pretrained(save_directory, **kwargs)


def _check_pattern(name: str, value: Any) -> None:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise InvalidInput(f"{name} = {value!r}: no regular expression ({error})") from error
