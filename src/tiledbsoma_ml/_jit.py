"""How the compiled loops are compiled: without the GIL, kept on disk, and safe where processes share that."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from filelock import FileLock
from numba.core.caching import FunctionCache
from numba.core.compiler_lock import global_compiler_lock

_Loop = TypeVar("_Loop", bound=Callable[..., Any])

_NO_LOCK = OSError, NotImplementedError
"""Raised where files cannot be locked: there, nothing is kept."""


class _OneAtATime(FunctionCache):  # type: ignore[misc]
    """Numba's cache on disk, for one process at a time.

    It keeps an index and a file for each set of argument types, and writes one after the other. When two
    processes do so at once, what one compiled can end under the argument types of the other: numba calls it
    all the same, and memory is overwritten. Ranks, workers and tests all compile at once on their first run.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._lock_path = Path(self.cache_path) / "tiledbsoma_ml.lock"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with suppress(*_NO_LOCK), FileLock(self._lock_path):
            return super().load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(*_NO_LOCK), FileLock(self._lock_path):
            super().save_overload(sig, data)


def jit(loop: _Loop) -> _Loop:
    """Compile a function on its first call with arguments of new types."""
    compiled = numba.njit(nogil=True, boundscheck=False)(loop)
    with suppress(RuntimeError):  # where nothing can be written to, every process compiles for itself
        compiled._cache = _OneAtATime(loop)
    return cast(_Loop, compiled)


# A process that is forked while another thread compiles would wait for that thread forever: it has none.
os.register_at_fork(
    before=global_compiler_lock.acquire,
    after_in_parent=global_compiler_lock.release,
    after_in_child=global_compiler_lock.release,
)
