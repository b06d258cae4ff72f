"""How good a ranking is, and how to calibrate a probability."""
