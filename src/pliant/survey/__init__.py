"""What each part of Pliant can do with a model, measured by running a tiny copy of it.

`CAPABILITIES` is the list of questions, to which every part can register its own. The matrix asks
them about every architecture and writes docs/architectures.md; `examine` asks about one config.
"""

# The questions, in the order of the columns.
from pliant.survey import foundation  # noqa: F401  isort: skip
from pliant.survey import complexity  # noqa: F401  isort: skip
from pliant.survey import structure  # noqa: F401  isort: skip
from pliant.survey import experts  # noqa: F401  isort: skip
from pliant.survey import gradients  # noqa: F401  isort: skip
from pliant.survey.capability import (
    CAPABILITIES,
    Capability,
    Fp64Throughout,
    Specimen,
    Verdict,
    ask,
    by_part,
    register,
)
from pliant.survey.examination import Estimate, Examination, Finding, Sizes, examine

__all__ = [
    "CAPABILITIES",
    "Capability",
    "Estimate",
    "Examination",
    "Finding",
    "Fp64Throughout",
    "Sizes",
    "Specimen",
    "Verdict",
    "ask",
    "by_part",
    "examine",
    "register",
]
