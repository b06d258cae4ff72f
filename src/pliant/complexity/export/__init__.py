"""Exports a scorer as a stock checkpoint, verified and with a model card."""

from pliant.complexity.export.checkpoint import export
from pliant.complexity.export.result import ExportResult

__all__ = ["ExportResult", "export"]
