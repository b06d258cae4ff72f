"""Agency: states and consent of attention heads, on top of gates.

`model` attaches them and changes states, `measure` observes heads on a batch, `heads` holds what is
known of one attention block, and `report` shows it.
"""

from pliant.structure.agency.model import Agency, attach_agency
from pliant.structure.agency.report import AgencyReport, HeadReport, State, Transition, Violation

__all__ = [
    "Agency",
    "AgencyReport",
    "HeadReport",
    "State",
    "Transition",
    "Violation",
    "attach_agency",
]
