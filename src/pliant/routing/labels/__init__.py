"""From prompts to a table of who was right, at what cost."""
