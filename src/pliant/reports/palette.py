"""The colours of pages and pictures: each means one thing, in light and in dark mode."""

from __future__ import annotations

from typing import Literal

Role = Literal["ours", "control", "rival", "bound", "good", "bad", "small", "large"]

COLOURS: dict[Role, tuple[str, str]] = {
    "ours": ("#2e6fdb", "#6ea0ff"),  # what is measured: the router, the expert, the pruned model
    "control": ("#98a2b3", "#7d8797"),  # chance, the base, standard training
    "rival": ("#d97706", "#f5a742"),  # the strongest alternative
    "bound": ("#9333ea", "#c08bff"),  # what nothing can exceed, such as perfect routing
    "good": ("#14804a", "#4cc38a"),
    "bad": ("#b42318", "#ff8a80"),
    "small": ("#0e7490", "#4fc3dc"),  # the cheap model
    "large": ("#be185d", "#f48fb8"),  # the expensive model
}
"""By role, for light and dark mode. A picture alone has the light ones."""
INK = "#000000"


def colour(role: Role) -> str:
    return COLOURS[role][0]


def themed(svg: str) -> str:
    """The picture in the colours of the page that it is in, whatever mode that is in."""
    for role, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{role})")
    return svg.replace(INK, "var(--ink)")


def variables(mode: int) -> str:
    """The colours as CSS variables, for light (0) and dark mode (1)."""
    return " ".join(f"--{role}: {pair[mode]};" for role, pair in COLOURS.items())
