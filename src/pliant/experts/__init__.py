"""Singular-value experts: a weight U diag(s) V^T becomes U diag(s z) V^T, and only z is trained.

    from peft import get_peft_model
    from pliant.experts import SVFConfig
    model = get_peft_model(base, SVFConfig())

Importing this package makes the method known to PEFT, so that saved experts can be loaded.
"""

from pliant.experts.config import SVFConfig
from pliant.experts.model import SVFModel, use_rows
from pliant.experts.rows import BASE, Rows

__all__ = ["BASE", "Rows", "SVFConfig", "SVFModel", "use_rows"]
