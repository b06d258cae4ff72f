"""Does selective training help here? Measured on the user's own model and data, beside controls.

    result = audit(model, batches, GradientConfig())       # a step's gradient, time and memory
    show(model, batch, GradientConfig())                   # which tokens would be trained
    result = race(model, rows, held_out, GradientConfig(), seconds=20)  # the loss it leads to
    trainer.add_callback(AuditCallback(auto=True))         # both, as a training begins

`contenders` are what is compared, `step` measures a step, `race` trains, and `result` is what it
comes to. The model is restored afterwards.
"""

from pliant.gradients.audit.audit import Audit, Finding, ShownToken, audit, show
from pliant.gradients.audit.callback import AuditCallback
from pliant.gradients.audit.contenders import Contender
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
