"""Rules for the threads of this package: forks wait for them, and they do not keep a process alive."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401
import gc
import multiprocessing
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Generic, Protocol, TypeVar

import filelock  # noqa: F401

# Functions that are registered later, for a fork or for the end, are called earlier. So pools and `filelock`
# are imported first: threads that a fork waits for may still need their locks.

_T = TypeVar("_T")

MAX_WAIT_S = 60.0
"""Longest time that a fork waits for a thread that is at work."""

POLL_S = 1.0
"""Time between two checks of a worker whether its parent is alive."""


# At work and at rest --------------------------------------------------------------------------------------


class _Lock(Protocol):
    def acquire(self) -> Any: ...

    def release(self) -> Any: ...


class _Turn(threading.local):
    """The lock of a thread, which holds it while it is at work."""

    def __init__(self) -> None:
        self.is_of_package = False
        self.is_at_work = False
        self.lock = threading.Lock()
        with _all_turns:
            _turns.add(self.lock)


_turns: weakref.WeakSet[Any] = weakref.WeakSet()
_all_turns = threading.RLock()
_turn = _Turn()


@contextmanager
def at_work() -> Iterator[None]:
    """Mark work on a thread of this package: a fork of the process waits until it is done.

    A fork copies one thread only. A lock that another thread holds at that moment (of an import, of TileDB,
    of a compiler) would stay locked in the new process for ever.
    """
    _turn.is_of_package = True
    if _turn.is_at_work:
        yield
        return
    _turn.lock.acquire()
    _turn.is_at_work = True
    try:
        yield
    finally:
        _turn.is_at_work = False
        _turn.lock.release()


@contextmanager
def at_rest() -> Iterator[None]:
    """Mark a wait for another thread, of any duration: a fork does not wait for this thread."""
    if not _turn.is_at_work:
        yield
        return
    _turn.is_at_work = False
    _turn.lock.release()
    try:
        yield
    finally:
        _turn.lock.acquire()
        _turn.is_at_work = True


def hold_at_forks(lock: _Lock) -> None:
    """Take a lock before each fork, when the threads of this package are at rest: they may need it."""
    _other_locks.append(lock)


_other_locks: list[_Lock] = []
_held: list[_Lock] = []


def _before_fork() -> None:
    _all_turns.acquire()
    mine = _turn.lock if _turn.is_at_work else None
    _held.extend(turn for turn in list(_turns) if turn is not mine and turn.acquire(timeout=MAX_WAIT_S))
    for lock in _other_locks:
        lock.acquire()
        _held.append(lock)


def _after_fork() -> None:
    while _held:
        _held.pop().release()
    _all_turns.release()


def _after_fork_in_child() -> None:
    gc.freeze()  # inherited garbage: to free a context of TileDB without its threads ends the process
    _turns.clear()  # their threads do not exist here
    _turns.add(_turn.lock)
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def check_process(pid: int) -> None:
    """Raise a RuntimeError if `pid`, the process of an iterator, is not this one: its threads are there."""
    if os.getpid() != pid:
        raise RuntimeError(
            f"an iterator must be used in the process that made it ({pid}), not in a fork of it "
            f"({os.getpid()}); make a new one here."
        )


# The end --------------------------------------------------------------------------------------------------


def before_exit(function: Callable[[], object]) -> None:
    """Call a function when the interpreter ends, before it waits for the threads of pools."""
    threading._register_atexit(function)  # type: ignore[attr-defined]


class ClosedWhenDropped(Iterator[_T], Generic[_T]):
    """The items of a generator, which is closed when this object is garbage.

    Garbage is collected on any thread. A generator that waits for threads of this package must not be closed
    on one of them, so such a thread starts another thread that closes it.
    """

    def __init__(self, items: Generator[_T, None, None]) -> None:
        self._items = items
        self._pid = os.getpid()
        weakref.finalize(self, _close, items, self._pid).atexit = False

    def __next__(self) -> _T:
        check_process(self._pid)
        return next(self._items)

    def close(self) -> None:
        """Close the generator, unless another process made it."""
        if os.getpid() == self._pid:
            self._items.close()


def _close(items: Generator[Any, None, None], pid: int) -> None:
    if os.getpid() != pid:  # this process must not close what another one opened
        _of_another_process.append(items)
    elif _turn.is_of_package:
        threading.Thread(target=at_work()(items.close), name="closing").start()
    else:
        items.close()


_of_another_process: list[Generator[Any, None, None]] = []


@cache
def end_with_parent() -> None:
    """End this worker process soon after its parent ends, whatever the worker does.

    A worker that still sends data would wait for ever, because nobody reads them.
    """
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_watch, args=[parent], name="end_with_parent", daemon=True).start()


def _watch(parent: Any) -> None:
    """Wait until the parent's pipe is closed, or this process gets a new parent.

    Forked siblings may keep the pipe open.
    """
    pid = os.getppid()  # with "forkserver" this is the server, which outlives its workers
    while parent.is_alive() and os.getppid() == pid:
        parent.join(POLL_S)
    os._exit(1)
