"""What verifiers take: references, one or several, and answers that may be missing."""

from __future__ import annotations

from typing import Any

from pliant.errors import InvalidInput


def each(reference: Any) -> list[Any]:
    """The references: one, or those of a list."""
    found = list(reference) if isinstance(reference, (list, tuple)) else [reference]
    if not found or any(x is None for x in found):
        raise InvalidInput(f"there is no reference ({reference!r})")
    return found


def as_text(value: Any) -> str:
    """No answer is an empty one."""
    return "" if value is None else str(value)


def folded(value: Any, ignore_case: bool) -> str:
    text = as_text(value).strip()
    return text.casefold() if ignore_case else text
