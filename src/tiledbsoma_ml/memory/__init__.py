"""The source of rows in memory: SciPy, NumPy, AnnData."""

from tiledbsoma_ml.memory.source import MemorySource

__all__ = ["MemorySource"]
