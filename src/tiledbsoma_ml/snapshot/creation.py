"""Helpers for the time in which a snapshot is made: progress, and a lock that other processes wait for."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import pwd
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from filelock import FileLock, Timeout

ProgressCallback: TypeAlias = Callable[[int, int, float, float], object]
"""A function that is called with the rows done, the rows in all, rows per second, and seconds left."""

GRACE_S = 0.1
"""Time to wait for a lock before telling that another process has it."""

LINE_EVERY_S = 5.0
"""Time between two lines of progress, if there is no terminal, or rich is not installed."""

logger = logging.getLogger("tiledbsoma_ml")


class Progress:
    """The progress of making a snapshot, which is shown to the user.

    Args:
        progress: True for a bar on a terminal (with rich) or a line on stderr every few seconds, False to
            show nothing, or a function to call.
        name: Name of the snapshot.
    """

    def __init__(self, progress: bool | ProgressCallback, name: str) -> None:
        if not (isinstance(progress, bool | np.bool_) or callable(progress)):
            raise TypeError(f"progress={progress!r} must be True, False or a function; try True.")
        self._name = name
        self._tell = bool(progress) if isinstance(progress, np.bool_) else progress
        self._total, self._done, self._before = 0, 0, 0
        self._start = self._last_line = 0.0
        self._bar: Any = None

    @contextmanager
    def of(self, total: int, done: int) -> Iterator[None]:
        """Begin to show progress: of `total` rows, `done` rows were written before."""
        self._total, self._done, self._before = total, done, done
        self._start = self._last_line = time.monotonic()
        if self._tell is True and sys.stderr.isatty() and importlib.util.find_spec("rich"):
            with _rich_bar() as self._bar:
                self._bar.add_task(self._name, total=total, completed=done, speed="")
                yield
        else:
            yield
        self._bar = None

    def reach(self, done: int) -> None:
        """Show that so many rows are done, by this process or by others."""
        if done == self._done:
            return
        self._done = done
        now = time.monotonic()
        speed = max(1, done - self._before) / max(1e-9, now - self._start)
        left = (self._total - self._done) / speed
        if callable(self._tell):
            self._tell(self._done, self._total, speed, left)
        elif self._bar is not None:
            self._bar.update(0, completed=self._done, speed=f"{speed:,.0f} rows/s")
        elif self._tell and (now - self._last_line >= LINE_EVERY_S or self._done == self._total):
            self._last_line = now
            self.say(f"{self._done:,} of {self._total:,} rows, {speed:,.0f} rows/s, {left:,.0f} s left")

    def say(self, text: str) -> None:
        """Write a line to stderr, or else to the log."""
        if self._tell is True:
            sys.stderr.write(f"{self._name}: {text}\n")
        else:
            logger.info("%s: %s", self._name, text)


def _rich_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[speed]}"), TimeRemainingColumn()]
    return Bar(*columns, console=Console(stderr=True))


@contextmanager
def locked(path: Path, tell: Callable[[str], object]) -> Iterator[None]:
    """Let one process at a time do something with a path; other processes wait.

    Args:
        path: The path.
        tell: Function that is called once if this waits, with the id of the process that has the lock.

    Raises:
        OSError: If the folder cannot be written to or has no locks, or another user has the lock.
    """
    file = path.with_name(f".{path.name}.lock")
    # A process that is killed leaves the file, so only a lock of the operating system counts.
    lock = FileLock(file, fallback_to_soft=False, on_acquired=_sign)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, file, tell)
    except OSError as err:
        raise OSError(err.errno, f"path={str(path)!r} must be {_what_is_wrong(file, err)}") from err
    try:
        yield
    finally:
        if lock.is_locked:  # not in a fork of the process that holds it
            file.unlink(missing_ok=True)
            lock.release()


def _acquire(lock: FileLock, file: Path, tell: Callable[[str], object]) -> None:
    """Take a lock; if another process holds it, tell so once."""
    timeout = GRACE_S
    while not lock.is_locked:
        try:
            lock.acquire(timeout)
        except Timeout:
            try:
                maker = file.read_text() or "another one"
            except FileNotFoundError:  # it was given back just now
                continue
            tell(maker)
            timeout = -1


def _sign(descriptor: int) -> None:
    """Write the id of this process to the file of a lock."""
    os.truncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())


def _what_is_wrong(lock: Path, err: OSError) -> str:
    if err.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        return f"on a disk with locks (flock), but: {err.strerror}; choose a folder on a local disk."
    if err.errno == errno.ELOOP:
        return (
            f"free to be made, but its lock {str(lock)!r} is a link, which is not followed; remove the link."
        )
    if err.errno in (errno.EACCES, errno.EPERM) and (owner := _owner_if_other(lock)):
        return (
            f"free to be made, but its lock {str(lock)!r} belongs to {owner}, who makes it or was ended "
            "while doing so; wait until it is there, or choose another path."
        )
    return f"in a folder that can be written to, but: {err.strerror}; choose another path."


def check_own_folder(folder: Path, path: Path) -> bool:
    """Return whether the folder in which a snapshot is made exists; make it readable for this user only.

    Raises:
        ValueError: If it is a link or a file.
        OSError: If it belongs to another user.
    """
    try:
        mode = folder.lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(mode):
        raise ValueError(
            f"path={str(path)!r} is made in the folder {str(folder)!r}, but a link or a file is there; "
            "remove it, or choose another path."
        )
    if owner := _owner_if_other(folder):
        raise PermissionError(
            errno.EPERM,
            f"path={str(path)!r} is made in the folder {str(folder)!r}, but that belongs to {owner}, who "
            "began to make it; wait until it is there, or choose another path.",
        )
    with suppress(OSError):  # a file system without modes
        folder.chmod(0o700)
    return True


def _owner_if_other(path: Path) -> str | None:
    """Return the owner of a file or folder; None if it is this user, or there is no such file."""
    try:
        user = path.lstat().st_uid
    except OSError:
        return None
    if user == os.geteuid():
        return None
    try:
        return f"the user {pwd.getpwuid(user).pw_name!r}"
    except KeyError:
        return f"the user {user}"
