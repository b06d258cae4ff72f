"""Does selective training help here? Measured on the user's own model and data, beside controls.

    found = audit(model, batches, GradientConfig())        # a step's gradient, time and memory
    ran = race(model, rows, held_out, GradientConfig(), seconds=20)        # and what it comes to
    trainer.add_callback(AuditCallback(auto=True))         # both, as a training begins

`contenders` says who is compared, `quality` and `cost` measure a step, `race` trains and `verdict`
says who won; `shown` tells which tokens they are. The model is left as it was found.
"""

from pliant.gradients.audit.audit import Audit, Finding, audit
from pliant.gradients.audit.callback import AuditCallback
from pliant.gradients.audit.contenders import Contender
from pliant.gradients.audit.preview import ShownToken, show
from pliant.gradients.audit.race import race
from pliant.gradients.audit.result import Race, Run

__all__ = [
    "Audit",
    "AuditCallback",
    "Contender",
    "Finding",
    "Race",
    "Run",
    "ShownToken",
    "audit",
    "race",
    "show",
]
