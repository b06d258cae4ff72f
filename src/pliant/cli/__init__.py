"""The command line: `pliant COMMAND`, one file a command."""

from pliant.cli.app import main

__all__ = ["main"]
