"""The life that every add-on shares: attach, disabled(), detach, save, load, push.

`life` is the adapter on its model, `wires` how it acts there; `saving` and `files` are the way into
a folder and back, `fingerprint` how a base is known again, `card` the page beside the weights.
"""

from pliant.adapters.fingerprint import Fingerprint, fingerprint
from pliant.adapters.life import Adapter, attach, attached
from pliant.adapters.wires import After, Around, Before, Wire

__all__ = [
    "Adapter",
    "After",
    "Around",
    "Before",
    "Fingerprint",
    "Wire",
    "attach",
    "attached",
    "fingerprint",
]
