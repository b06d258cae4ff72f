"""The commands of `pliant expert`, one file each: a model's specialities, a small file each."""

from __future__ import annotations

HELP = """Train, inspect, mix and export singular-value experts.

An expert is a small file that turns its base model into a specialist.

Example: pliant expert train --base nano-l --task nano:reading --out reading
"""
# Every command of the group and its line in `pliant expert --help`.
COMMANDS: dict[str, str] = {
    "train": "Train an expert by reward, in a folder that survives a kill.",
    "list": "Show the experts in a folder.",
    "show": "Show what an expert changes, or where two differ.",
    "classify": "Show which expert a prompt needs, or fit a classifier.",
    "mix": "Mix experts to suit a few solved examples.",
    "ask": "Ask prompts; each picks its own expert.",
    "merge": "Write an expert and its base as one stock model.",
    "export-lora": "Write an expert as a LoRA, which needs no Pliant.",
}
