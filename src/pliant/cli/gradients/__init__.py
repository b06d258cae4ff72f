"""The commands of `pliant gradients`, one file each: does training on selected tokens help?"""

from __future__ import annotations

HELP = """Measure whether training on selected tokens helps, and show which tokens they are.

On your own model and data, beside standard training, random tokens and smaller batches.

Example: pliant gradients audit --model nano-s --data nano --ratio 0.25
"""
# Every command of the group and its line in `pliant gradients --help`.
COMMANDS = {
    "audit": "Compare selective training with its controls, and race them.",
    "show": "Colour texts by the tokens that would be trained.",
}
