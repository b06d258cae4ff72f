"""The demo's chapters: each part of Pliant adds its own, and `pliant demo` plays them in order."""
