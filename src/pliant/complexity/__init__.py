"""The [CPX] token: score a prompt from the prefill it needs anyway.

`config` is what a user may set, `model` the scorer on its base, `generation` how it scores while
the base generates; `start`, `asking`, `lora` and `reading` are its parts, `prompts` and `scores`
what goes in and comes out.
"""

from pliant.complexity.config import CPXConfig
from pliant.complexity.model import Complexity, attach
from pliant.complexity.scores import Scores

__all__ = ["CPXConfig", "Complexity", "Scores", "attach"]
