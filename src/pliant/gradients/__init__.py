"""Train where it matters: the tokens of a batch that are worth a gradient, and only those backward.

`config` is what a user may set, `model` what attaches, `engines` how a loss on some tokens alone is
computed, `choosing` which tokens these are, `schedule` how many of them and when all. `facade` is
the interface of code that was written before.
"""

from pliant.gradients.config import GradientConfig
from pliant.gradients.model import Gradients, GradientsWarning, attach

__all__ = ["GradientConfig", "Gradients", "GradientsWarning", "attach"]
