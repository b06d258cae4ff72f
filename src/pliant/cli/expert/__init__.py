"""The commands of `pliant expert`, one file each: a model's specialities, a small file each."""

from __future__ import annotations

HELP = """Train, inspect, mix and export singular-value experts.

An expert is a small file that turns its base model into a specialist.

Example: pliant expert --help
"""
# Every command of the group and its line in `pliant expert --help`.
COMMANDS: dict[str, str] = {}
