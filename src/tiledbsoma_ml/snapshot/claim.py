"""`Claim`: a file that one process at a time has, until it gives it back or ends."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path


class Claim:
    """A claim to a file, by a lock of the operating system; any thread of its process can give it back.

    Unlike `filelock`, this makes no folder: who is late makes nothing anew that another process removed.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pid = os.getpid()
        _claims.add(self)

    def give_back(self) -> None:
        """Let others claim the file."""
        if self._pid == os.getpid():  # not in a fork of the process that has it
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            _claims.discard(self)

    def close_in_fork(self) -> None:
        """Let the claim end with the process that has it, though this fork goes on."""
        os.close(self._descriptor)


def claim(file: Path) -> Claim | None:
    """Return a claim to a file, which is made if necessary; None if it is claimed, or its folder is gone."""
    with suppress(FileNotFoundError):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            os.close(descriptor)
            if err.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        else:
            os.truncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            return Claim(descriptor)
    return None


def claimed_by(file: Path) -> str:
    """Return the id of the process that claimed a file last."""
    with suppress(FileNotFoundError):
        return file.read_text() or "another one"
    return "another one"


_claims: set[Claim] = set()


def _close_in_fork() -> None:
    for inherited in _claims:
        inherited.close_in_fork()
    _claims.clear()


os.register_at_fork(after_in_child=_close_in_fork)
