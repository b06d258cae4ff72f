"""How a scorer leaves: the stock model, the proof that it agrees, the card beside it."""

from pliant.complexity.export.checkpoint import export
from pliant.complexity.export.result import ExportResult

__all__ = ["ExportResult", "export"]
