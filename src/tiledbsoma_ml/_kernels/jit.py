"""`jit`: compiles loops without the GIL, with a cache on disk that processes share safely."""

from __future__ import annotations

import hashlib
import io
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from filelock import FileLock
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.compiler_lock import global_compiler_lock

from tiledbsoma_ml._threads import hold_at_forks

logger = logging.getLogger("tiledbsoma_ml")

_Loop = TypeVar("_Loop", bound=Callable[..., Any])

_NO_LOCK = OSError, NotImplementedError
"""Errors that say that a file cannot be locked, or not in time. Then nothing is cached."""

MAX_WAIT_S = 60.0
"""Longest wait for the lock. Its holder needs milliseconds, unless that process was stopped."""

DIGEST_BYTES = 16


class Waiting:
    """The time that a process compiles, which is told once, when it gets long.

    Args:
        told_after_s: Seconds of compiling after which a line of the log tells it.
    """

    def __init__(self, told_after_s: float = 2.0) -> None:
        self._told_after_s = told_after_s
        self.seconds = 0.0

    def add(self, seconds: float, folder: str) -> None:
        """Count the seconds of one more loop, whose machine code is kept in a folder."""
        was_short = self.seconds < self._told_after_s
        self.seconds += seconds
        if was_short and self.seconds >= self._told_after_s:
            logger.warning(
                "tiledbsoma_ml compiles its loops for this machine, which takes some seconds once; "
                "they are kept in %s (NUMBA_CACHE_DIR names another folder)",
                folder,
            )


waiting = Waiting()


class _WholeFiles(IndexDataCacheFile):  # type: ignore[misc]
    """Files of numba's cache that end in a digest; a damaged file counts as missing.

    Numba itself raises each time if it cannot read a file, and runs machine code that has changed. It ignores
    bytes that follow its own, so the digest does not disturb it.
    """

    def _load_index(self) -> Any:
        return super()._load_index() if _is_intact(Path(self._index_path)) else {}

    def _load_data(self, name: str) -> Any:
        if not _is_intact(Path(self._data_path(name))):
            raise FileNotFoundError(name)
        return super()._load_data(name)

    @contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[io.BytesIO]:
        content = io.BytesIO()
        yield content
        with super()._open_for_write(filepath) as file:
            file.write(content.getvalue() + _digest(content.getvalue()))


def _is_intact(path: Path) -> bool:
    content = path.read_bytes() if path.exists() else b""
    return content[-DIGEST_BYTES:] == _digest(content[:-DIGEST_BYTES])


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()


class _OneAtATime(FunctionCache):  # type: ignore[misc]
    """Numba's cache on disk, which one process at a time reads or writes.

    Numba writes an index, and then a file for each set of argument types. If two processes do this at once,
    the code of one can be stored under the argument types of the other. Numba would run it, and it would
    overwrite memory. Ranks, workers and tests compile at the same time on their first run.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _WholeFiles(
            cache_path=self.cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=self._impl.locator.get_source_stamp(),
        )
        self._lock_path = Path(self.cache_path) / "tiledbsoma_ml.lock"
        self._began: float | None = None

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        found = None
        with suppress(*_NO_LOCK), FileLock(self._lock_path, timeout=MAX_WAIT_S):
            found = super().load_overload(sig, target_context)
        self._began = time.perf_counter() if found is None else None
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        if self._began is not None:
            waiting.add(time.perf_counter() - self._began, self.cache_path)
        with suppress(*_NO_LOCK), FileLock(self._lock_path, timeout=MAX_WAIT_S):
            super().save_overload(sig, data)


def jit(loop: _Loop) -> _Loop:
    """Compile a function on its first call with arguments of new types."""
    compiled = numba.njit(nogil=True, boundscheck=False)(loop)
    with suppress(RuntimeError):  # if no folder can be written to, every process compiles for itself
        compiled._cache = _OneAtATime(loop)
    return cast(_Loop, compiled)


def jit_inner(loop: _Loop) -> _Loop:
    """Compile a function into each loop that calls it; Python cannot call it, which saves time to compile."""
    inner = numba.njit(nogil=True, boundscheck=False, no_cpython_wrapper=True, no_cfunc_wrapper=True)
    return cast(_Loop, inner(loop))


# A process that is forked while another thread compiles would wait for that thread for ever.
hold_at_forks(global_compiler_lock)
