"""From a goal in words to a threshold, and what it promises."""
