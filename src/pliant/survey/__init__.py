"""What each part of Pliant can do with a model: asked by running a tiny copy of it.

`CAPABILITIES` is the list of questions; parts that come later register theirs. The matrix asks them
of every architecture and writes docs/architectures.md; `examine` asks them of one config.
"""

# The questions, in the order of the columns.
from pliant.survey import foundation  # noqa: F401  isort: skip
from pliant.survey import caching  # noqa: F401  isort: skip
from pliant.survey import scoring  # noqa: F401  isort: skip
from pliant.survey import leaving  # noqa: F401  isort: skip
from pliant.survey import learning  # noqa: F401  isort: skip
from pliant.survey.capability import CAPABILITIES, Capability, Verdict, ask, by_part, register
from pliant.survey.examination import Examination, Finding, examine
from pliant.survey.sizes import Estimate, Sizes
from pliant.survey.specimen import Fp64Throughout, Specimen

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
