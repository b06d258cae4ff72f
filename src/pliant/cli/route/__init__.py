"""The commands of `pliant route`, one file each: from prompts to labels to a router."""

from __future__ import annotations

HELP = """Send each prompt to the model that it needs.

Label a file of prompts with the models that get them right, fit a router on the labels, ask
through it.
"""
# Every command of the group and its line in `pliant route --help`.
COMMANDS = {
    "ask": "Ask a prompt through a router.",
    "calibrate": "Recompute a router's probabilities and threshold.",
    "evaluate": "Measure a router on held-out prompts.",
    "fit": "From labels to a router: try scorers, keep one, set its threshold.",
    "label": "Run models over prompts: which are right, and at what cost?",
    "report": "Everything measured about a router, as one HTML page.",
}
EXAMPLE = (
    "pliant route label --prompts questions.jsonl --model nano-s --model nano-l --out labels.jsonl"
)
