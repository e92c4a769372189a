"""Arrays in memory that a process shares with its child processes."""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import context, reduction
from typing import Any

import numpy as np
from numpy.typing import NDArray


class SharedArray:
    """A copy of int64 numbers that child processes, spawned or forked, share without further copies.

    If one process writes to `numbers`, all see it. Pickled for any other purpose, it becomes a separate copy.
    It is a file in memory, or on disk where the system has no files in memory, and no folder lists it. It
    disappears with the last process that has it, and is not limited by the size of /dev/shm, which is 64 MB
    in many containers.
    """

    def __init__(self, numbers: NDArray[np.int64]) -> None:
        self._descriptor = _open_unlisted()
        weakref.finalize(self, os.close, self._descriptor)
        with open(self._descriptor, "wb", closefd=False) as file:
            file.write(np.ascontiguousarray(numbers, dtype=np.int64).data)
        self.numbers = _mapped(self._descriptor, numbers.shape)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock, which one process at a time can hold."""
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    def __reduce__(self) -> tuple[Any, ...]:
        if context.get_spawning_popen() is None:
            return SharedArray, (np.array(self.numbers),)
        return _received, (reduction.DupFd(self._descriptor), self.numbers.shape)


def _received(sent: Any, shape: tuple[int, ...]) -> SharedArray:
    received = SharedArray.__new__(SharedArray)
    received._descriptor = sent.detach()
    weakref.finalize(received, os.close, received._descriptor)
    received.numbers = _mapped(received._descriptor, shape)
    return received


def _open_unlisted() -> int:
    """Return the descriptor of an empty file that no folder lists."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tiledbsoma_ml")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _mapped(descriptor: int, shape: tuple[int, ...]) -> NDArray[np.int64]:
    if not math.prod(shape):
        return np.empty(shape, dtype=np.int64)
    return np.frombuffer(mmap.mmap(descriptor, 8 * math.prod(shape)), dtype=np.int64).reshape(shape)
