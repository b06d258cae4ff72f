"""The parts of a causal LM, identified by structure; the only code that knows architectures."""

from pliant.anatomy.anatomy import Anatomy
from pliant.anatomy.blocks import Attention, Mixture, Mlp
from pliant.anatomy.depth import FirstLayers, run_first

__all__ = ["Anatomy", "Attention", "FirstLayers", "Mixture", "Mlp", "run_first"]
