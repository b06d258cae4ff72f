"""What the live router uses: preferences, availability, costs, the ledger, drift."""
