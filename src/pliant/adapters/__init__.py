"""Adapters: attach, disable, detach, save, load and push, the same for every part.

`adapter` is the base class and `hooks` how it acts on a model; `saving` writes and loads it,
`files` is the layout of its folder, and `fingerprint` identifies the base it was trained on.
"""

from pliant.adapters.adapter import Adapter, attach, attached
from pliant.adapters.fingerprint import Fingerprint, fingerprint
from pliant.adapters.hooks import After, Around, Before, Wire
from pliant.adapters.parameters import Within

__all__ = [
    "Adapter",
    "After",
    "Around",
    "Before",
    "Fingerprint",
    "Wire",
    "Within",
    "attach",
    "attached",
    "fingerprint",
]
