"""The commands of `pliant train`, one file each."""

from __future__ import annotations

HELP = """Train a language model, on every token or on selected ones, or a scorer.

Without a command: `lm`. A run that is killed is resumed by the same command with --resume.
"""
# Every command of the group and its line in `pliant train --help`.
COMMANDS = {
    "lm": "Train a language model; a short race decides on which tokens.",
    "scorer": "Train a scorer on prompts and labels: how hard is a prompt?",
}
DEFAULT = "lm"
EXAMPLE = "pliant train --model nano-s --data notes.txt --out mine"
