"""A router at work: who should answer and who can, the ledger, drift."""
