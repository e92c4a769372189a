"""Iterators that compute the next items on threads while the current one is used."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from types import TracebackType
from typing import Generic, TypeVar

from tiledbsoma_ml._threads import at_rest, at_work, check_process

_S = TypeVar("_S")
_T = TypeVar("_T")


class EagerIterator(Iterator[_T], Generic[_T]):
    """An iterator over the items of `iterator`, each computed on a thread while the one before is used.

    An exception of `iterator` is raised in place of its item. Use this as a context manager, or call `close`:
    then no thread outlives it, and a generator is closed as well.

    Args:
        iterator: The items. One thread at a time advances it, and only after its last item was taken.
        pool: The pool whose threads compute; a thread of its own if None.
    """

    def __init__(self, iterator: Iterator[_T], pool: Executor | None = None) -> None:
        self._iterator = iterator
        self._pid = os.getpid()
        self._pool = pool or ThreadPoolExecutor(max_workers=1, thread_name_prefix="EagerIterator")
        self._owns_pool = pool is None
        self._next: Future[tuple[_T] | None] | None = self._pool.submit(self._advance)

    def __next__(self) -> _T:
        check_process(self._pid)
        if self._next is None:
            raise StopIteration
        try:
            with at_rest():
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
        if os.getpid() != self._pid:  # the thread is in another process, and so is what it uses
            return
        pending, self._next = self._next, None
        with at_rest():
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
        with at_work():
            try:
                return (next(self._iterator),)
            except StopIteration:
                return None


def interleaved(iterators: Sequence[Iterator[_T]]) -> Generator[_T, None, None]:
    """Yield an item of each iterator in turn; each computes its next item on a thread of its own."""
    with ExitStack() as stack:
        waiting = deque(stack.enter_context(EagerIterator(iterator)) for iterator in iterators)
        while waiting:
            iterator = waiting.popleft()
            for item in islice(iterator, 1):
                waiting.append(iterator)
                yield item


class EagerMap(Iterator[_T], Generic[_S, _T]):
    """An iterator over `function(item)` for each item, in order; several are computed ahead on threads.

    An exception is raised in place of its item. Use this as a context manager, or call `close`: then no
    thread outlives it, and a generator of items is closed as well.

    Args:
        function: The function. Several threads call it at once.
        items: The items. The thread that iterates advances them.
        n_threads: Number of threads, and of items that are computed ahead.
    """

    def __init__(self, function: Callable[[_S], _T], items: Iterator[_S], n_threads: int) -> None:
        self._function = at_work()(function)
        self._items = items
        self._pid = os.getpid()
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="EagerMap")
        self._pending: deque[Future[_T]] = deque()
        for _ in range(n_threads):
            self._submit()

    def __next__(self) -> _T:
        check_process(self._pid)
        if not self._pending:
            self.close()
            raise StopIteration
        try:
            with at_rest():
                result = self._pending.popleft().result()
        except BaseException:
            self.close()
            raise
        self._submit()
        return result

    def close(self) -> None:
        """Wait for the items that are being computed, drop them, and end the threads."""
        if os.getpid() != self._pid:
            return
        self._pending.clear()
        with at_rest():
            self._pool.shutdown(wait=True, cancel_futures=True)
        if close := getattr(self._items, "close", None):
            close()

    def __enter__(self) -> EagerMap[_S, _T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self) -> None:
        try:
            item = next(self._items)
        except StopIteration:
            return
        except BaseException as err:  # it is raised in the place of this item
            self._pending.append(Future())
            self._pending[-1].set_exception(err)
            return
        self._pending.append(self._pool.submit(self._function, item))
