"""How right the embedded models are."""
