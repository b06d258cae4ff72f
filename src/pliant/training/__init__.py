"""What every training run shares, whatever it trains.

`run` is the life of a run, `folder` what may begin or resume where, `result` what it reached,
`checkpoint` the one layout of checkpoints and which of them are complete, `terminal` its progress
and Ctrl-C, and `distributed` several processes.
"""

from pliant.training.checkpoint import AdapterCheckpoint, restore_adapters, save_adapters

__all__ = ["AdapterCheckpoint", "restore_adapters", "save_adapters"]
