"""`pliant.attach`: the configuration tells which part is attached to a model.

    scorer = attach(model, CPXConfig(), tokenizer)
    gradients = attach(model, GradientConfig(ratio=0.25))

Each part has an `attach` of its own, with the same result; an adapter of your own is attached as it
is. A part is imported when its configuration is passed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, overload

from pliant import adapters
from pliant.errors import InvalidInput

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

    from pliant.adapters import Adapter
    from pliant.complexity.config import CPXConfig
    from pliant.complexity.model import Complexity
    from pliant.experts.config import SVFConfig
    from pliant.gradients.config import GradientConfig
    from pliant.gradients.model import Gradients
    from pliant.structure.config import GateConfig
    from pliant.structure.gates import Gates
    from pliant.structure.skips import SkipConfig, Skips

    A = TypeVar("A", bound=Adapter)


@overload
def attach(model: nn.Module, config: A, name: str | None = None, /) -> A: ...
@overload
def attach(model: nn.Module, config: A, *, name: str | None = None) -> A: ...
@overload
def attach(
    model: nn.Module, config: CPXConfig, tokenizer: Any = None, name: str | None = None
) -> Complexity: ...
@overload
def attach(
    model: nn.Module,
    config: GradientConfig,
    tokenizer: Any = None,
    name: str | None = None,
    *,
    router: Any = None,
) -> Gradients: ...
@overload
def attach(
    model: nn.Module, config: GateConfig, tokenizer: Any = None, name: str | None = None
) -> Gates: ...
@overload
def attach(
    model: nn.Module, config: SkipConfig, tokenizer: Any = None, name: str | None = None
) -> Skips: ...
@overload
def attach(
    model: nn.Module, config: SVFConfig, tokenizer: Any = None, name: str | None = None
) -> PeftModel: ...
def attach(
    model: nn.Module,
    config: Any,
    tokenizer: Any = None,
    name: str | None = None,
    **options: Any,
) -> Any:
    """Attach to `model` what `config` configures, under a name, and return it.

    `CPXConfig`: a scorer, which reads texts and messages with the `tokenizer`; the other parts need
    none. `GradientConfig`: selective training (`router=` scores the tokens). `GateConfig` and
    `SkipConfig`: gates, and skips between layers. `SVFConfig`: a new expert; the result is PEFT's
    model. An `Adapter` is attached itself. Each changes nothing before it is trained or set, and
    `detach()` (of an expert, `unload()`) restores the model.
    """
    if isinstance(config, adapters.Adapter):
        third = tokenizer if isinstance(tokenizer, str) else None
        if options or (tokenizer is not None and third is None):
            raise InvalidInput("an Adapter is attached as it is: give its name, and nothing else")
        return adapters.attach(model, config, third if name is None else name)
    if isinstance(tokenizer, str):
        raise InvalidInput(
            f"{tokenizer!r} is where the tokenizer goes: give the name as name={tokenizer!r}"
        )
    names = [base.__name__ for base in type(config).__mro__]
    kind = next((each for each in names if each in {*PARTS, *NEED_GATES}), names[0])
    if kind in NEED_GATES:
        raise InvalidInput(f"{kind} goes with gates that are attached: {NEED_GATES[kind]}")
    if kind not in PARTS:
        raise InvalidInput(
            f"config = {config!r}: give an instance of {', '.join(PARTS)}, or an Adapter"
        )
    if kind == "CPXConfig":
        options["tokenizer"] = tokenizer
    return PARTS[kind](model, config, name=name, **options)


NEED_GATES = {
    "AgencyConfig": "pliant.structure.attach_agency(gates, config)",
    "ControllerConfig": "pliant.structure.Controller(gates, config)",
    "PlasticityConfig": "pliant.structure.attach_plasticity(gates, config)",
}


def _scorer(model: nn.Module, config: CPXConfig, **options: Any) -> Complexity:
    from pliant.complexity.model import attach

    return attach(model, config, **options)


def _gradients(model: nn.Module, config: GradientConfig, **options: Any) -> Gradients:
    from pliant.gradients.model import attach

    return attach(model, config, **options)


def _gates(model: nn.Module, config: GateConfig, **options: Any) -> Gates:
    from pliant.structure.gates import attach

    return attach(model, config, **options)


def _skips(model: nn.Module, config: SkipConfig, **options: Any) -> Skips:
    from pliant.structure.skips import attach

    return attach(model, config, **options)


def _expert(model: Any, config: SVFConfig, name: str | None = None) -> PeftModel:
    from peft import get_peft_model

    attached: Any = get_peft_model(model, config, adapter_name=name or "default")
    return attached


PARTS: dict[str, Callable[..., Any]] = {
    "CPXConfig": _scorer,
    "GradientConfig": _gradients,
    "GateConfig": _gates,
    "SkipConfig": _skips,
    "SVFConfig": _expert,
}
