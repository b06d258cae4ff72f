"""Models that can be asked, here or behind a URL, and what asking costs."""
