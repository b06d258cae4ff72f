"""From a table of labels to a router, and what it is worth on prompts it has not seen."""
