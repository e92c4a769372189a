"""The next item is computed while this one is used."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

_T = TypeVar("_T")


class EagerIterator(Iterator[_T], Generic[_T]):
    """The items of `iterator`, each computed on a thread while the one before is used.

    An exception of the iterator is raised where its item would have come. Use it as a context manager, or
    call `close`: then no thread outlives it, and an iterator that is a generator is closed as well.

    Args:
        iterator: Advanced by one thread at a time, never before the item it made was taken.
        pool: Where to compute; a thread of its own if None.
    """

    def __init__(self, iterator: Iterator[_T], pool: Executor | None = None) -> None:
        self._iterator = iterator
        self._pool = pool or ThreadPoolExecutor(max_workers=1, thread_name_prefix="EagerIterator")
        self._owns_pool = pool is None
        self._next: Future[tuple[_T] | None] | None = self._pool.submit(self._advance)

    def __next__(self) -> _T:
        if self._next is None:
            raise StopIteration
        try:
            item = self._next.result()
        except BaseException:
            self.close()
            raise
        if item is None:
            self.close()
            raise StopIteration
        self._next = self._pool.submit(self._advance)
        return item[0]

    def close(self) -> None:
        """Wait for the item that is being computed, drop it, and end the thread."""
        pending, self._next = self._next, None
        if pending is not None and not pending.cancel():
            pending.exception()
        if self._owns_pool:
            self._pool.shutdown(wait=True)
        if close := getattr(self._iterator, "close", None):
            close()

    def __enter__(self) -> EagerIterator[_T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _advance(self) -> tuple[_T] | None:
        try:
            return (next(self._iterator),)
        except StopIteration:
            return None
