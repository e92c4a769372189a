"""Files of a snapshot, which are written once, each with its checksum, and opened and mapped with checks."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import mmap
import os
import stat
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._threads import at_work

FORMAT = "tiledbsoma-ml snapshot"
FORMAT_VERSION, COMPRESSED_VERSION = 1, 2

WAY_OUT = "remove the snapshot and make it again, or restore the file."

TEXT = attrs.validators.instance_of(str)
COUNT = attrs.validators.and_(attrs.validators.instance_of(int), attrs.validators.ge(0))


@attrs.frozen
class File:
    """A file of a snapshot: its name, size, and the SHA-256 of its bytes in hexadecimal."""

    name: str = attrs.field(validator=TEXT)
    nbytes: int = attrs.field(validator=COUNT)
    sha256: str = attrs.field(validator=TEXT)

    @contextmanager
    def open(self, folder: Path) -> Iterator[BufferedReader]:
        """Check the file with `check_size`, and open it for reading."""
        self.check_size(folder)
        with open_plain(folder / self.name) as file:
            yield file

    def check_size(self, folder: Path) -> None:
        """Raise a ValueError if the file is missing, is a link or a folder, or has another size."""
        path = folder / self.name
        expected = f"{self.nbytes:,} bytes (SHA-256 {self.sha256})"
        try:
            found = path.lstat()
        except OSError as err:
            raise ValueError(
                f"{str(path)!r} must be there with {expected}, but is missing; {WAY_OUT}"
            ) from err
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{str(path)!r} must be a plain file, no link and no folder; {WAY_OUT}")
        if found.st_size != self.nbytes:
            raise ValueError(f"{str(path)!r} must have {expected}, not {found.st_size:,}; {WAY_OUT}")

    def check_content(self, folder: Path) -> None:
        """Raise a ValueError if the bytes of the file have changed since it was written."""
        with self.open(folder) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise ValueError(
                f"{str(folder / self.name)!r} must have the SHA-256 {self.sha256}, not {found}: it was "
                f"altered; {WAY_OUT}"
            )


def damaged(folder: Path, file: File, rule: str) -> ValueError:
    """Return the error for a file that has its size, but breaks a rule."""
    return ValueError(
        f"{str(folder / file.name)!r} {rule}: it is damaged; `Snapshot.verify()` tells which files are, "
        "then remove the snapshot and make it again, or restore them."
    )


# Text with a checksum -------------------------------------------------------------------------------------


def sealed(fields: dict[str, Any]) -> str:
    """Return fields as JSON; the last field is the SHA-256 of the JSON of the others."""
    return _json({**fields, "sha256": hashlib.sha256(_json(fields).encode()).hexdigest()})


def read_sealed(path: Path, what: str) -> dict[str, Any]:
    """Return the fields of a file whose text `sealed` made.

    Raises:
        ValueError: If the file does not exist, was altered, or has a newer format.
    """
    try:
        with open_plain(path) as file:
            text = file.read().decode()
        fields = json.loads(text)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise ValueError(
            f"path={str(path.parent)!r} must be {what}, but has no {path.name}; choose another path, or make "
            "one there with Snapshot.create."
        ) from err
    except ValueError as err:
        raise ValueError(f"{str(path)!r} must be JSON, but: {err}; {WAY_OUT}") from err
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} must have the format {FORMAT!r}; {WAY_OUT}")
    version = fields.get("format_version")
    if version not in (FORMAT_VERSION, COMPRESSED_VERSION):
        raise ValueError(
            f"{str(path)!r} must have format_version {FORMAT_VERSION} or {COMPRESSED_VERSION}, not "
            f"{version!r}; read it with the tiledbsoma-ml that made it, or install a newer one."
        )
    found = fields.pop("sha256", None)
    expected = hashlib.sha256(_json(fields).encode()).hexdigest()
    if found != expected or text != sealed(fields):
        raise ValueError(
            f"{str(path)!r} must have the SHA-256 {found}, not {expected}: it was altered; {WAY_OUT}"
        )
    return fields


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=1) + "\n"


def open_plain(path: Path) -> BufferedReader:
    """Open a plain file for reading, without following a link, or waiting for a pipe.

    Raises:
        ValueError: If it is not a plain file.
        OSError: If it does not exist or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as err:
        if err.errno == errno.ELOOP:
            raise ValueError(f"{str(path)!r} must be a plain file, no link and no folder; {WAY_OUT}") from err
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{str(path)!r} must be a plain file, no link and no folder; {WAY_OUT}")
    return os.fdopen(descriptor, "rb")


def open_new(path: Path) -> BufferedWriter:
    """Open a new file for writing, and remove any file or link with its name before."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb")


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it exists completely, or not at all."""
    new = path.with_name(path.name + ".new")
    with open_new(new) as file:
        file.write(text.encode())
    fsync(new)
    new.replace(path)


def fsync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Background:
    """A context in which a thread calls functions, one after the other; its end waits for all of them."""

    def __enter__(self) -> Background:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fsync")
        self._pending: list[Future[object]] = []
        return self

    def call(self, function: Callable[[], object]) -> None:
        """Make the thread call a function; if it fails, the end of the context raises its error."""
        self._pending.append(self._pool.submit(at_work()(function)))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._pool.shutdown(cancel_futures=error is not None)
        if error is None:
            for pending in self._pending:
                pending.result()


# Arrays ---------------------------------------------------------------------------------------------------


class HashedFile:
    """A new file with a checksum, which arrays are appended to; a context closes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_new(path)
        self._sha256 = hashlib.sha256()
        self._nbytes = 0

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, array: NDArray[Any]) -> None:
        """Append an array, in little-endian byte order."""
        view = little_endian_bytes(array)
        self._sha256.update(view)
        self._nbytes += len(view)
        self._file.write(view)

    @property
    def written(self) -> File:
        """The file as it was written so far."""
        return File(self._path.name, self._nbytes, self._sha256.hexdigest())


def write_array(path: Path, arrays: Sequence[NDArray[Any]]) -> File:
    """Write arrays, one after the other, to a new file."""
    with HashedFile(path) as file:
        for array in arrays:
            file.write(array)
    return file.written


def describe_file(path: Path) -> File:
    """Return the name, size and checksum of a file."""
    with open_plain(path) as file:
        return File(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def digest(joinids: NDArray[np.int64]) -> str:
    """Return a digest of joinids."""
    return hashlib.blake2b(little_endian_bytes(joinids), digest_size=16).hexdigest()


def little_endian_bytes(array: NDArray[Any]) -> memoryview:
    """Return the bytes of an array in C order; without a copy if the array has this layout already."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_longlong]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def map_file(folder: Path, file: File, dtype: str) -> NDArray[Any]:
    """Return a file as a read-only array in mapped memory.

    Unlike `mmap.mmap`, this keeps no file descriptor: a snapshot can have more files than a process may open.

    Raises:
        ValueError: If the file is missing, is not a plain file, or has another size.
    """
    with file.open(folder) as opened:
        if not file.nbytes:
            return np.empty(0, dtype)
        address = _libc.mmap(None, file.nbytes, mmap.PROT_READ, mmap.MAP_SHARED, opened.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder / file.name))
    buffer = (ctypes.c_uint8 * file.nbytes).from_address(address)
    weakref.finalize(buffer, _libc.munmap, address, file.nbytes).atexit = False
    array: NDArray[Any] = np.frombuffer(memoryview(buffer), np.dtype(dtype))
    array.flags.writeable = False
    return array
