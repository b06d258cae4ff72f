"""A training from beginning to end, as `pliant train` makes it: its data, settings and folder."""
