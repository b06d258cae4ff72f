"""The parts of a causal LM, identified by structure; the only code that knows architectures."""

from pliant.anatomy.anatomy import Anatomy
from pliant.anatomy.attention import Attention
from pliant.anatomy.depth import FirstLayers, run_first
from pliant.anatomy.mlp import Mlp

__all__ = ["Anatomy", "Attention", "FirstLayers", "Mlp", "run_first"]
