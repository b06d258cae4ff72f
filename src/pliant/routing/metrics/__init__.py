"""How good a ranking is, and how well a probability is kept."""
