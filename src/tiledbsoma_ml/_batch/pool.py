"""`Pool`: memory for arrays, which is used again when nobody uses the arrays any longer."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMALL_BYTES = 2**17
"""Size of arrays below which new memory is as fast as that of a pool."""


class Pool:
    """A pool of memory, which makes arrays in memory of earlier arrays that nobody uses any longer.

    The first write to memory that is new to a process is slow: for a mini-batch it takes longer than the
    work. A view, a tensor or a memoryview keeps its array alive, and when Python collects that array, its
    memory returns to the pool. So the pool need not count references. Several threads may use it.

    Args:
        max_bytes: Largest number of bytes that are kept. The memory that was returned first is freed first.
        small_bytes: Size below which arrays are not made in the pool.
    """

    def __init__(self, max_bytes: int, *, small_bytes: int = SMALL_BYTES) -> None:
        self._max_bytes = max_bytes
        self._small_bytes = small_bytes
        self._free: list[NDArray[np.uint8]] = []  # only touched with the lock
        self._lock = threading.Lock()
        self._returned: deque[NDArray[np.uint8]] = deque()  # by finalizers, which may run at any point

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process has memory of its own."""
        return partial(Pool, small_bytes=self._small_bytes), (self._max_bytes,)

    def empty(self, shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an array with arbitrary content, whose memory nobody else uses."""
        n_bytes = math.prod((shape,) if isinstance(shape, int) else shape) * dtype.itemsize
        if n_bytes < self._small_bytes:
            return np.empty(shape, dtype)
        memory = self._take(n_bytes)
        # Not a view of `memory`: its views would refer to `memory`, and SciPy copies small parts of arrays.
        lent: NDArray[Any] = np.frombuffer(memory.data[:n_bytes], dtype)
        weakref.finalize(lent, self._give_back, memory).atexit = False
        return lent.reshape(shape)

    @property
    def free_bytes(self) -> int:
        """Bytes of memory that are kept for later arrays."""
        return sum(map(len, self._free))

    def _take(self, n_bytes: int) -> NDArray[np.uint8]:
        """Return memory of at least `n_bytes` bytes, but not of many more."""
        found = None
        if self._lock.acquire(blocking=False):
            try:
                for k in reversed(range(len(self._free))):  # the latest may still be in the processor's cache
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
        """Keep the memory that was returned. If another thread holds the lock, that thread does this."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                while self._returned:
                    self._keep(self._returned.popleft())
            finally:
                self._lock.release()

    def _keep(self, memory: NDArray[np.uint8]) -> None:
        if len(memory) <= self._max_bytes:
            self._free.append(memory)
        while self.free_bytes > self._max_bytes:
            self._free.pop(0)
