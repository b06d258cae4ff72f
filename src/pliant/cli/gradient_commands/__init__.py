"""The commands of `pliant gradients`, one a file."""
