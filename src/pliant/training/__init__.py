"""What every training run shares, whatever it trains.

`checkpoint` has the one layout and tells which checkpoints are complete, `interrupt` handles
Ctrl-C, `distributed` several processes.
"""

from pliant.training.checkpoint import AdapterCheckpoint, restore_adapters, save_adapters

__all__ = ["AdapterCheckpoint", "restore_adapters", "save_adapters"]
