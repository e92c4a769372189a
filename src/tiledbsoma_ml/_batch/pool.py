"""Memory of mini-batches, used again when nobody looks into it any longer."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMALL_BYTES = 2**17
"""Memory of smaller arrays is fast to get."""


class Pool:
    """Gives out arrays in memory that was given out before and that nobody holds any longer.

    Memory that is new to a process is slow to write to at first: for a mini-batch it takes longer than the
    work. Whatever looks into an array (a view, a tensor, a memoryview) keeps the array below it alive, and
    when that one is collected, its memory comes back here: no references are counted. Safe in several
    threads.

    Args:
        max_bytes: So much memory that nobody holds is kept at most; what came back first goes first.
        small_bytes: Arrays below so many bytes have memory of their own.
    """

    def __init__(self, max_bytes: int, *, small_bytes: int = SMALL_BYTES) -> None:
        self._max_bytes = max_bytes
        self._small_bytes = small_bytes
        self._free: list[NDArray[np.uint8]] = []  # only touched with the lock
        self._lock = threading.Lock()
        self._returned: deque[NDArray[np.uint8]] = deque()  # by finalizers, which may run at any point

    def empty(self, shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an array of any content that nobody else holds."""
        n_bytes = math.prod((shape,) if isinstance(shape, int) else shape) * dtype.itemsize
        if n_bytes < self._small_bytes:
            return np.empty(shape, dtype)
        memory = self._take(n_bytes)
        # Not a view of `memory`: views of views would refer to that, and SciPy copies what is a small part.
        lent: NDArray[Any] = np.frombuffer(memory.data[:n_bytes], dtype)
        weakref.finalize(lent, self._give_back, memory).atexit = False
        return lent.reshape(shape)

    @property
    def kept_bytes(self) -> int:
        """Bytes of memory that nobody holds and that is kept for later."""
        return sum(map(len, self._free))

    def _take(self, n_bytes: int) -> NDArray[np.uint8]:
        """Return memory of at least so many bytes, and of not many more."""
        found = None
        if self._lock.acquire(blocking=False):
            try:
                for k in reversed(range(len(self._free))):  # what came back last may still be in the cache
                    if n_bytes <= len(self._free[k]) <= 4 * n_bytes:
                        found = self._free.pop(k)
                        break
            finally:
                self._lock.release()
        self._settle()
        if found is not None:
            return found
        unit = max(2**12, 2 ** (n_bytes.bit_length() - 4))
        return np.empty(-(-n_bytes // unit) * unit, dtype=np.uint8)

    def _give_back(self, memory: NDArray[np.uint8]) -> None:
        self._returned.append(memory)
        self._settle()

    def _settle(self) -> None:
        """Take in what came back; whoever holds the lock does so when it is done."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                while self._returned:
                    self._keep(self._returned.popleft())
            finally:
                self._lock.release()

    def _keep(self, memory: NDArray[np.uint8]) -> None:
        if len(memory) <= self._max_bytes:
            self._free.append(memory)
        while self.kept_bytes > self._max_bytes:
            self._free.pop(0)
