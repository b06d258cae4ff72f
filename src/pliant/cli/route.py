"""`pliant route ...`: from prompts to labels to a router; `pliant.cli.routes` has the commands."""

from __future__ import annotations

HELP = """Send each prompt to the model that it needs: label, fit, ask.

Label a file of prompts with who gets them right, fit a router on the labels, ask through it.
"""
# Every command of the group and the line that `pliant route --help` shows for it.
# `pliant.cli.routes.<name>` has a function of that name, and an EXAMPLE.
COMMANDS = {
    "ask": "Ask a prompt through a router.",
    "calibrate": "Set a router's probabilities and threshold anew.",
    "evaluate": "Measure a router on prompts that it was not made on.",
    "fit": "From labels to a router: try scorers, keep one, set its threshold.",
    "label": "Run models over prompts: who is right, and at what cost?",
    "report": "All that there is to say of a router, as one HTML page.",
}
EXAMPLE = (
    "pliant route label --prompts questions.jsonl --model nano-s --model nano-l --out labels.jsonl"
)
