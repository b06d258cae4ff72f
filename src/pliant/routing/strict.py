"""Parts of a strict JSON file: no unknown keys; an error is one line with the nearest valid key."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pliant.errors import did_you_mean

Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def fault(error: ValidationError, root: type[Part]) -> str:
    """The first error on one line: where and what, and for an unknown key the nearest valid one."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        *place, key = first["loc"]
        inside = "".join(f"{step}." for step in place).rstrip(".")
        near = did_you_mean(str(key), _keys(root, place))
        return f"{inside + ': ' if inside else ''}no key {str(key)!r}{near}"
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if first["type"] in ("value_error", "missing") else f", and is {first['input']!r}"
    return f"{where}: {message}{shown}" if where else message


def _keys(root: type[Part], place: list[Any]) -> list[str]:
    """The valid keys at a place."""
    kind: Any = root
    for step in place:
        if isinstance(step, str):
            kind = kind.model_fields[step].annotation
        kind = _part(kind)
    return list(kind.model_fields)


def _part(kind: Any) -> Any:
    """The Part in an annotation such as `Drift | None` or `list[SettingsBand]`."""
    if isinstance(kind, type) and issubclass(kind, Part):
        return kind
    parts = map(_part, get_args(kind))
    return next((part for part in parts if part is not None), None)
