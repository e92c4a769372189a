"""Errors of the disk on which a snapshot is made, in words that say what to do."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_DISK_FAILS = (errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.EFBIG)


def check_space(path: Path, needed: int) -> None:
    """Raise an OSError unless the disk of a path has `needed` free bytes."""
    if shutil.disk_usage(path.parent).free < needed:
        raise disk_error(path, OSError(errno.ENOSPC, ""), needed)


@contextmanager
def naming_disk(path: Path, needed: int, is_of_disk: Callable[[OSError], bool]) -> Iterator[None]:
    """Raise an OSError in words that say what is wrong with the disk; see `disk_error`.

    Args:
        path: The path of the snapshot that is made.
        needed: Estimated number of bytes that are still to be written.
        is_of_disk: Function that tells whether an error comes from the disk of the snapshot.
    """
    try:
        yield
    except OSError as err:
        if not is_of_disk(err):
            raise
        raise disk_error(path, err, needed) from err


def disk_error(path: Path, err: OSError, needed: int) -> OSError:
    """Return an error that says what is wrong with the disk; other errors are returned unchanged.

    Args:
        path: The path of the snapshot that is made.
        err: The error that was raised.
        needed: Estimated number of bytes that were still to be written.
    """
    free = shutil.disk_usage(path.parent).free
    where = f" ({err.filename!r})" if err.filename else ""
    if err.errno == errno.ENOSPC and free < needed:
        rule = f"on a disk with {_mib(needed)} free, not {_mib(free)}; free some or choose another disk"
    elif err.errno in (errno.ENOSPC, errno.EDQUOT):
        rule = (
            f"where {_mib(needed)} may be written, but: {err.strerror}, though the disk has {_mib(free)} "
            "free: a quota or the number of files is at its end; choose another disk"
        )
    elif err.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        rule = f"in a folder that can be written to, but: {err.strerror}{where}; allow it, or choose another"
    elif err.errno in _DISK_FAILS:
        rule = f"on a disk that works, but: {err.strerror}{where}; look after the disk, or choose another"
    else:
        return err
    message = f"path={str(path)!r} must be {rule}, and call again: what is finished is kept."
    return OSError(err.errno, message)


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
