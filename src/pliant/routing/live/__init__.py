"""What the live router uses: preferences, decisions, the ledger, drift."""
