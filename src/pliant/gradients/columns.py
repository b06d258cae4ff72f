"""What a row holds besides its tokens, kept on its way through a Trainer.

A Trainer takes away what the model's own forward does not name; the patched one takes more.
"""

from __future__ import annotations

from transformers import Trainer

from pliant.gradients.batch import EXTRAS

BESIDES = EXTRAS[:2]


def keep(trainer: Trainer) -> None:
    """Let weights and ids of examples through. (A loop of one's own takes nothing away.)"""
    trainer._set_signature_columns_if_needed()
    known = trainer._signature_columns
    trainer._signature_columns = [*known, *(name for name in BESIDES if name not in known)]
