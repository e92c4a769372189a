"""What a snapshot's directory holds: the manifest, its files and their checksums.

`docs/snapshot_format.md` specifies it to the byte.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import mmap
import os
import stat
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._csr import smallest_uint

FORMAT = "tiledbsoma-ml snapshot"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"


_TEXT = attrs.validators.instance_of(str)
_COUNT = attrs.validators.and_(attrs.validators.instance_of(int), attrs.validators.ge(0))
_TEXTS = attrs.validators.deep_iterable(_TEXT)


@attrs.frozen
class File:
    """A file of a snapshot: its name, size, and the SHA-256 of its bytes in hexadecimal."""

    name: str = attrs.field(validator=_TEXT)
    nbytes: int = attrs.field(validator=_COUNT)
    sha256: str = attrs.field(validator=_TEXT)

    @contextmanager
    def open(self, folder: Path) -> Iterator[BufferedReader]:
        """Open the file to read it, having checked what `check_size` checks."""
        self.check_size(folder)
        with open_plain(folder / self.name) as file:
            yield file

    def check_size(self, folder: Path) -> None:
        """Raise a ValueError if the file is missing, a link or a folder, or not as long as it was written."""
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
        """Raise a ValueError if the file is not, byte for byte, as it was written."""
        with self.open(folder) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise ValueError(
                f"{str(folder / self.name)!r} must have the SHA-256 {self.sha256}, not {found}: it was "
                f"altered; {WAY_OUT}"
            )


WAY_OUT = "remove the snapshot and make it again, or restore the file."


@attrs.frozen(kw_only=True)
class Shard:
    """Neighbouring rows of a layer as CSR: three files.

    Attributes:
        row_start: First row.
        row_stop: Last row, plus one.
        nnz: Stored values.
        data_dtype: Type of the values as they are stored.
        indptr: Where each row starts, and where the last ends; int64, of shape (n_rows + 1,).
        indices: Columns, ascending within a row.
        data: Values.
    """

    row_start: int = attrs.field(validator=_COUNT)
    row_stop: int = attrs.field(validator=_COUNT)
    nnz: int = attrs.field(validator=_COUNT)
    data_dtype: str = attrs.field(validator=_TEXT)
    indptr: File
    indices: File
    data: File

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.row_stop - self.row_start

    @property
    def files(self) -> tuple[File, File, File]:
        """All three."""
        return self.indptr, self.indices, self.data

    def contradictions(self, dtype: str, indices_dtype: str, n_vars: int) -> Iterator[str]:
        """Yield in words what of it does not fit together, or to a layer of these types and columns."""
        name = self.data.name
        if self.data_dtype not in stored_dtypes(dtype):
            yield f"{name} has values of {self.data_dtype!r}, in which {dtype!r} is not kept"
        elif self.nnz > self.n_rows * n_vars:
            yield f"{name} has more values than {self.n_rows:,} rows of {n_vars:,} columns"
        else:
            yield from _other_size(self.indptr, self.n_rows + 1, "<i8")
            yield from _other_size(self.indices, self.nnz, indices_dtype)
            yield from _other_size(self.data, self.nnz, self.data_dtype)

    def check_ends(self, folder: Path) -> None:
        """Raise a ValueError unless `indptr` begins with 0 and ends with the number of stored values."""
        with self.indptr.open(folder) as file:
            ends = b"".join(os.pread(file.fileno(), 8, place) for place in (0, self.indptr.nbytes - 8))
        first, last = np.frombuffer(ends, "<i8").tolist()
        if (first, last) != (0, self.nnz):
            raise damaged(folder, self.indptr, f"must lead from 0 to {self.nnz:,}, not {first} to {last}")


@attrs.frozen(kw_only=True)
class Layer:
    """A layer of `X`.

    Attributes:
        name: Name of the layer.
        dtype: Type of the values as they are given out.
        indices_dtype: Type of the columns as they are stored.
        shards: Together all rows, in order.
    """

    name: str = attrs.field(validator=_TEXT)
    dtype: str = attrs.field(validator=_TEXT)
    indices_dtype: str = attrs.field(validator=_TEXT)
    shards: tuple[Shard, ...]

    @property
    def nnz(self) -> int:
        """Stored values."""
        return sum(shard.nnz for shard in self.shards)

    def contradictions(self, n_obs: int, n_vars: int) -> Iterator[str]:
        """Yield in words what of it does not fit together, or to so many rows and columns."""
        if self.dtype not in DTYPES:
            yield f"layer {self.name!r} has the dtype {self.dtype!r}, which is none of X"
            return
        if self.indices_dtype != (expected := indices_dtype(n_vars).str):
            yield f"layer {self.name!r} has indices of {self.indices_dtype!r}, not {expected!r}"
            return
        row = 0
        for shard in self.shards:
            before, row = row, shard.row_stop
            if shard.row_start != before or shard.n_rows <= 0:
                yield f"{shard.data.name} has rows {shard.row_start:,} to {row:,}, not from {before:,} on"
            yield from shard.contradictions(self.dtype, self.indices_dtype, n_vars)
        if row != n_obs:
            yield f"the shards of layer {self.name!r} end with row {row:,}, not {n_obs:,}"


@attrs.frozen(kw_only=True)
class Embedding:
    """An array of `obsm`: rows of the snapshot times `n_cols`, row after row."""

    name: str = attrs.field(validator=_TEXT)
    dtype: str = attrs.field(validator=_TEXT)
    n_cols: int = attrs.field(validator=_COUNT)
    values: File

    def contradictions(self, n_obs: int) -> Iterator[str]:
        """Yield in words what of it does not fit together, or to so many rows."""
        if self.dtype not in DTYPES:
            yield f"obsm {self.name!r} has the dtype {self.dtype!r}, which is none of an array"
        else:
            yield from _other_size(self.values, n_obs * self.n_cols, self.dtype)


def _other_size(file: File, n: int, dtype: str) -> Iterator[str]:
    n_bytes = n * np.dtype(dtype).itemsize
    if file.nbytes != n_bytes:
        yield f"{file.name} has {file.nbytes:,} bytes, not the {n_bytes:,} of {n:,} values of {dtype!r}"


DTYPES = ("|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f4", "<f8")
"""What layers and arrays of `obsm` can have."""

_NARROWER = {
    "f": ("|u1", "<u2", "<u4", "<f4"),
    "u": ("|u1", "<u2", "<u4"),
    "i": ("|u1", "|i1", "<u2", "<i2", "<u4", "<i4"),
}


def stored_dtypes(dtype: str) -> tuple[str, ...]:
    """Return the types in which values of a layer can be stored, the first that holds them is taken."""
    given = np.dtype(dtype)
    narrower = _NARROWER.get(given.kind, ())
    return (*(name for name in narrower if np.dtype(name).itemsize < given.itemsize), dtype)


def indices_dtype(n_vars: int) -> np.dtype[Any]:
    """Return the type of the numbers of so many columns."""
    dtype: np.dtype[Any] = smallest_uint(n_vars).newbyteorder("<")
    return dtype


def damaged(folder: Path, file: File, rule: str) -> ValueError:
    """Return the error of a file that is as long as it was written, but breaks a rule."""
    return ValueError(
        f"{str(folder / file.name)!r} {rule}: it is damaged; `Snapshot.verify()` tells which files are, "
        "then remove the snapshot and make it again, or restore them."
    )


@attrs.frozen(kw_only=True)
class Source:
    """The source of neighbouring rows of a snapshot.

    Attributes:
        uri: URI of the experiment.
        measurement_name: For instance "RNA".
        tiledb_timestamp_ms: At which it was opened.
        versions: What was written to each array, as a digest; without those for which that is not known.
        n_obs: Number of rows.
        obs_digest: Digest of their joinids.
    """

    uri: str = attrs.field(validator=_TEXT)
    measurement_name: str = attrs.field(validator=_TEXT)
    tiledb_timestamp_ms: int = attrs.field(validator=_COUNT)
    versions: dict[str, str] = attrs.field(validator=attrs.validators.deep_mapping(_TEXT, _TEXT))
    n_obs: int = attrs.field(validator=_COUNT)
    obs_digest: str = attrs.field(validator=_TEXT)

    def differences(self, other: Source) -> list[str]:
        """Return in words what `other` has, and what this has instead, but for the rows."""
        found = _differences(
            ("the experiment", self.uri, other.uri),
            ("the measurement", self.measurement_name, other.measurement_name),
        )
        for array in sorted(self.versions.keys() & other.versions.keys()):
            if not found and self.versions[array] != other.versions[array]:
                found = [f"{array} was written to since the snapshot was made"]
        return found


@attrs.frozen(kw_only=True)
class Content:
    """What a snapshot holds; two with the same fingerprint hold the same.

    Attributes:
        sources: The sources of the rows, one after the other.
        n_vars: Number of columns.
        var_digest: Digest of the joinids of the columns.
        layer_names: Layers of `X`; the first is the one that is read if none is named.
        obs_column_names: Columns of `obs`.
        obsm_names: Arrays of `obsm`.
    """

    sources: tuple[Source, ...]
    n_vars: int = attrs.field(validator=_COUNT)
    var_digest: str = attrs.field(validator=_TEXT)
    layer_names: tuple[str, ...] = attrs.field(validator=_TEXTS)
    obs_column_names: tuple[str, ...] = attrs.field(validator=_TEXTS)
    obsm_names: tuple[str, ...] = attrs.field(validator=_TEXTS)

    @property
    def n_obs(self) -> int:
        """Number of rows."""
        return sum(source.n_obs for source in self.sources)

    @property
    def arrays(self) -> tuple[str, ...]:
        """Arrays that it comes from."""
        return arrays_of(self.layer_names, self.obsm_names)

    @property
    def fingerprint(self) -> str:
        """A digest of all but the timestamps, which are new whenever an experiment is opened."""
        text = json.dumps(attrs.asdict(self, filter=lambda a, _: a.name != "tiledb_timestamp_ms"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def differences(self, other: Content) -> list[str]:
        """Return in words what `other` has, and what this has instead."""
        found = _differences(
            ("the number of queries", len(self.sources), len(other.sources)),
            ("the number of rows", self.n_obs, other.n_obs),
            ("the number of columns", self.n_vars, other.n_vars),
            ("the layers", list(self.layer_names), list(other.layer_names)),
            ("obs_column_names", list(self.obs_column_names), list(other.obs_column_names)),
            ("obsm", list(self.obsm_names), list(other.obsm_names)),
        )
        for ours, its in zip(self.sources, other.sources, strict=False):
            found += ours.differences(its)
        if not found and self.var_digest != other.var_digest:
            found = ["var_joinids are others, or in another order"]
        if not found and any(
            a.obs_digest != b.obs_digest for a, b in zip(self.sources, other.sources, strict=True)
        ):
            found = ["obs_joinids are others"]
        return found


def arrays_of(layer_names: Sequence[str], obsm_names: Sequence[str] = ()) -> tuple[str, ...]:
    """Return how versions name the arrays that layers and arrays of `obsm` come with."""
    return ("obs", "var", *(f"X/{name}" for name in layer_names), *(f"obsm/{name}" for name in obsm_names))


def _differences(*compared: tuple[str, Any, Any]) -> list[str]:
    return [f"{what} is {ours!r} there, not {its!r}" for what, ours, its in compared if ours != its]


@attrs.frozen(kw_only=True)
class Manifest:
    """All that is known about a snapshot without its data."""

    created_by: str = attrs.field(validator=_TEXT)
    created_at: str = attrs.field(validator=_TEXT)
    content: Content
    layers: tuple[Layer, ...]
    obsm: tuple[Embedding, ...]
    obs_joinids: File
    var_joinids: File
    obs: File
    var: File

    @property
    def files(self) -> Iterator[File]:
        """All files but the manifest itself."""
        yield from (self.obs_joinids, self.var_joinids, self.obs, self.var)
        for layer in self.layers:
            for shard in layer.shards:
                yield from shard.files
        yield from (embedding.values for embedding in self.obsm)

    def write(self, folder: Path) -> None:
        """Write `manifest.json`."""
        fields = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": self.content.fingerprint,
            **attrs.asdict(self),
        }
        write_atomically(folder / MANIFEST, sealed(fields))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `manifest.json`.

        Raises:
            ValueError: If this is no snapshot, one of a newer format, or the manifest was altered.
        """
        fields = read_sealed(folder / MANIFEST, "a snapshot")
        path = str(folder / MANIFEST)
        try:
            manifest = _from_fields(fields)
        except KeyError as err:
            raise ValueError(f"{path!r} must be a manifest, but lacks {err}; {WAY_OUT}") from err
        except (TypeError, ValueError, AttributeError) as err:
            raise ValueError(f"{path!r} must be a manifest, but {err.args[0]}; {WAY_OUT}") from err
        if fields["fingerprint"] != manifest.content.fingerprint:
            raise ValueError(f"{path!r} must have the fingerprint of its content, but has another; {WAY_OUT}")
        manifest.check(folder)
        return manifest

    def check(self, folder: Path) -> None:
        """Raise a ValueError that says what of it does not fit together: names, sizes, types, rows.

        Nothing is read. What passes can be mapped by what it says, if the files have the sizes it says.
        """
        if wrong := next(self._contradictions(), None):
            raise ValueError(f"{str(folder / MANIFEST)!r} must fit together, but {wrong}; {WAY_OUT}")

    def check_files(self, folder: Path) -> None:
        """Raise a ValueError that names the first file that is missing, has another size or other ends."""
        for file in self.files:
            file.check_size(folder)
        for layer in self.layers:
            for shard in layer.shards:
                shard.check_ends(folder)

    def _contradictions(self) -> Iterator[str]:
        content = self.content
        names = [file.name for file in self.files]
        for name in names:
            if name in ("", ".", "..", MANIFEST) or "/" in name or "\0" in name:
                yield f"{name!r} is no plain name of a file"
        if len(set(names)) < len(names):
            yield "two files have one name"
        if not content.sources or not content.layer_names:
            yield "it has no source, or no layer"
        if tuple(layer.name for layer in self.layers) != content.layer_names:
            yield f"it has other layers than {list(content.layer_names)}"
        if tuple(item.name for item in self.obsm) != content.obsm_names:
            yield f"it has other arrays of obsm than {list(content.obsm_names)}"
        yield from _other_size(self.obs_joinids, content.n_obs, "<i8")
        yield from _other_size(self.var_joinids, content.n_vars, "<i8")
        for layer in self.layers:
            yield from layer.contradictions(content.n_obs, content.n_vars)
        for item in self.obsm:
            yield from item.contradictions(content.n_obs)


def _content_from(fields: dict[str, Any]) -> Content:
    """Return the content that `attrs.asdict` made fields of."""
    return Content(
        sources=tuple(Source(**source) for source in fields["sources"]),
        n_vars=fields["n_vars"],
        var_digest=fields["var_digest"],
        layer_names=tuple(fields["layer_names"]),
        obs_column_names=tuple(fields["obs_column_names"]),
        obsm_names=tuple(fields["obsm_names"]),
    )


def shard_from(fields: dict[str, Any]) -> Shard:
    """Return the shard that `attrs.asdict` made fields of."""
    files = {name: File(**fields[name]) for name in ("indptr", "indices", "data")}
    return Shard(**{**fields, **files})


def _from_fields(fields: dict[str, Any]) -> Manifest:
    return Manifest(
        created_by=fields["created_by"],
        created_at=fields["created_at"],
        content=_content_from(fields["content"]),
        layers=tuple(
            Layer(**{**layer, "shards": tuple(shard_from(shard) for shard in layer["shards"])})
            for layer in fields["layers"]
        ),
        obsm=tuple(Embedding(**{**item, "values": File(**item["values"])}) for item in fields["obsm"]),
        **{name: File(**fields[name]) for name in ("obs_joinids", "var_joinids", "obs", "var")},
    )


# Text with a checksum -------------------------------------------------------------------------------------


def sealed(fields: dict[str, Any]) -> str:
    """Return fields as JSON, with the SHA-256 of the JSON without it as the last one."""
    return _json({**fields, "sha256": hashlib.sha256(_json(fields).encode()).hexdigest()})


def read_sealed(path: Path, what: str) -> dict[str, Any]:
    """Return the fields of a file that `sealed` made.

    Raises:
        ValueError: If there is none, it was altered, or is of a newer format.
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
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} must have format_version {FORMAT_VERSION}, not {version!r}; read it with the "
            "tiledbsoma-ml that made it, or install a newer one."
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
    """Open a plain file to read it; no link is followed, and nothing else is waited for.

    Raises:
        ValueError: If it is a link, a folder, or anything else.
        OSError: If it is not there or cannot be read.
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
    """Open a new file to write to it, in place of what has its name; a link is not followed."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb")


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is there whole, or is not there."""
    new = path.with_name(path.name + ".new")
    with open_new(new) as file:
        file.write(text.encode())
    fsync(new)
    new.replace(path)


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Arrays ---------------------------------------------------------------------------------------------------


class HashedFile:
    """A new file, written to piece by piece; closed by its context."""

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
        """Append an array, little-endian."""
        view = little_endian_bytes(array)
        self._sha256.update(view)
        self._nbytes += len(view)
        self._file.write(view)

    @property
    def written(self) -> File:
        """What was written so far."""
        return File(self._path.name, self._nbytes, self._sha256.hexdigest())


def write_array(path: Path, arrays: Sequence[NDArray[Any]]) -> File:
    """Write arrays, one after the other, into a new file."""
    with HashedFile(path) as file:
        for array in arrays:
            file.write(array)
    return file.written


def describe_file(path: Path) -> File:
    """Return name, size and checksum of a file that was written."""
    with open_plain(path) as file:
        return File(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def digest(joinids: NDArray[np.int64]) -> str:
    """Return a digest of joinids."""
    return hashlib.blake2b(little_endian_bytes(joinids), digest_size=16).hexdigest()


def little_endian_bytes(array: NDArray[Any]) -> memoryview:
    """Return the bytes of an array, row after row; without a copy where they are there already."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_longlong]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def map_file(folder: Path, file: File, dtype: str) -> NDArray[Any]:
    """Return a file as a read-only array in shared memory pages.

    Other than `mmap.mmap`, this keeps no file descriptor: a snapshot has more files than a process may open.

    Raises:
        ValueError: If the file is missing, no plain file, or has another size.
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
