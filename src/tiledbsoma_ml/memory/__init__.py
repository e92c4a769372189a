"""Rows in memory, as a source: SciPy, NumPy, AnnData."""

from tiledbsoma_ml.memory.source import MemorySource

__all__ = ["MemorySource"]
