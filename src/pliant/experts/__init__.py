"""Singular-value experts: a weight U diag(s) V^T becomes U diag(s z) V^T, and only z is trained.

    from peft import get_peft_model
    from pliant.experts import SVFConfig
    model = get_peft_model(base, SVFConfig())

Importing this package makes the method known to PEFT, so that saved experts can be loaded.
"""

from pliant.experts.comparison import Comparison, Profile
from pliant.experts.config import SVFConfig
from pliant.experts.expert import Expert
from pliant.experts.export import MergeResult, merge
from pliant.experts.factors import singular_values
from pliant.experts.lora import LoraResult, to_lora
from pliant.experts.model import SVFModel, use_rows
from pliant.experts.rows import BASE, Rows

__all__ = [
    "BASE",
    "Comparison",
    "Expert",
    "LoraResult",
    "MergeResult",
    "Profile",
    "Rows",
    "SVFConfig",
    "SVFModel",
    "merge",
    "singular_values",
    "to_lora",
    "use_rows",
]
