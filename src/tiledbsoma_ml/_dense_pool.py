"""Memory of dense mini-batches, used again when nobody holds it any longer."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._common import NDArrayNumber


class DensePool:
    """Gives out zeroed arrays of one width, in memory that was given out before and is free again.

    Memory that is new to a process is slow to write to at first: for a large mini-batch it takes longer than
    the work. Whatever looks into an array (a view of it, a tensor) holds a reference to the memory below, so
    memory with no reference but the pool's own is free.

    Args:
        n_kept: How many arrays' memory is kept for later.
    """

    def __init__(self, n_kept: int = 3) -> None:
        self._n_kept = n_kept
        self._kept: list[NDArray[np.uint8]] = []

    def zeros(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArrayNumber:
        """Return a zeroed array that nobody else holds."""
        X = self.empty(shape, dtype)
        X.fill(0)
        return X

    def empty(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArrayNumber:
        """Return an array, of any content, that nobody else holds."""
        n_bytes = shape[0] * shape[1] * dtype.itemsize
        for memory in self._kept:
            if len(memory) >= n_bytes and sys.getrefcount(memory) == _REFERENCES_OF_FREE:
                return memory[:n_bytes].view(dtype).reshape(shape)
        memory = np.empty(n_bytes, dtype=np.uint8)
        if len(self._kept) == self._n_kept:
            self._kept.pop(0)
        self._kept.append(memory)
        return memory.view(dtype).reshape(shape)


_REFERENCES_OF_FREE = 3
"""Held by the pool's list, by the loop's variable and by the call that counts."""
