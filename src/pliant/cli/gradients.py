"""`pliant gradients ...`: does training on some tokens help; `cli.gradient_commands` has them."""

from __future__ import annotations

HELP = """Which tokens train: does it help, and which are they?

Measured on a model and data of yours, beside standard training, random tokens and smaller batches.
"""
# Every command of the group and the line that `pliant gradients --help` shows for it.
# `pliant.cli.gradient_commands.<name>` has a function of that name, and an EXAMPLE.
COMMANDS = {
    "audit": "Compare selective training with its controls, and race them.",
    "show": "Texts, coloured by what would be trained.",
}
EXAMPLE = "pliant gradients audit --model nano-s --data nano --ratio 0.25"
