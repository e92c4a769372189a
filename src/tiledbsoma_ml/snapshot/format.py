"""`Manifest`: the shards, layers and arrays of a snapshot, and checks that they fit together.

`docs/snapshot_format.md` specifies it to the byte.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from tiledbsoma_ml._csr import smallest_uint
from tiledbsoma_ml.snapshot.content import Content, Origin
from tiledbsoma_ml.snapshot.files import (
    COUNT,
    FORMAT,
    FORMAT_VERSION,
    TEXT,
    WAY_OUT,
    File,
    damaged,
    read_sealed,
    sealed,
    write_atomically,
)

MANIFEST = "manifest.json"


@attrs.frozen(kw_only=True)
class Shard:
    """Consecutive rows of a layer in CSR, in three files.

    Attributes:
        row_start: The first row.
        row_stop: The row after the last one.
        nnz: Number of stored values.
        data_dtype: Type of the stored values.
        indptr: File of the row starts; int64, of shape (n_rows + 1,).
        indices: File of the columns, which ascend within a row.
        data: File of the values.
    """

    row_start: int = attrs.field(validator=COUNT)
    row_stop: int = attrs.field(validator=COUNT)
    nnz: int = attrs.field(validator=COUNT)
    data_dtype: str = attrs.field(validator=TEXT)
    indptr: File
    indices: File
    data: File

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.row_stop - self.row_start

    @property
    def files(self) -> tuple[File, File, File]:
        """The three files."""
        return self.indptr, self.indices, self.data

    def contradictions(self, dtype: str, indices_dtype: str, n_vars: int) -> Iterator[str]:
        """Yield, in words, contradictions within the shard, or with the types and columns of its layer."""
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
            ends = b"".join(os.pread(file.fileno(), 8, offset) for offset in (0, self.indptr.nbytes - 8))
        first, last = np.frombuffer(ends, "<i8").tolist()
        if (first, last) != (0, self.nnz):
            raise damaged(folder, self.indptr, f"must lead from 0 to {self.nnz:,}, not {first} to {last}")


@attrs.frozen(kw_only=True)
class Layer:
    """A layer of `X`.

    Attributes:
        name: Name of the layer.
        dtype: Type of the values that readers return.
        indices_dtype: Type of the stored columns.
        shards: The shards, which have all rows in order.
    """

    name: str = attrs.field(validator=TEXT)
    dtype: str = attrs.field(validator=TEXT)
    indices_dtype: str = attrs.field(validator=TEXT)
    shards: tuple[Shard, ...]

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return sum(shard.nnz for shard in self.shards)

    def contradictions(self, n_obs: int, n_vars: int) -> Iterator[str]:
        """Yield, in words, contradictions within the layer, or with the numbers of rows and columns."""
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
    """An array of `obsm`, with a row of `n_cols` values for each row of the snapshot."""

    name: str = attrs.field(validator=TEXT)
    dtype: str = attrs.field(validator=TEXT)
    n_cols: int = attrs.field(validator=COUNT)
    values: File

    def contradictions(self, n_obs: int) -> Iterator[str]:
        """Yield, in words, contradictions within the array, or with the number of rows."""
        if self.dtype not in DTYPES:
            yield f"obsm {self.name!r} has the dtype {self.dtype!r}, which is none of an array"
        else:
            yield from _other_size(self.values, n_obs * self.n_cols, self.dtype)


def _other_size(file: File, n: int, dtype: str) -> Iterator[str]:
    n_bytes = n * np.dtype(dtype).itemsize
    if file.nbytes != n_bytes:
        yield f"{file.name} has {file.nbytes:,} bytes, not the {n_bytes:,} of {n:,} values of {dtype!r}"


DTYPES = ("|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f4", "<f8")
"""Types that layers and arrays of `obsm` can have."""

_NARROWER = {
    "f": ("|u1", "<u2", "<u4", "<f4"),
    "u": ("|u1", "<u2", "<u4"),
    "i": ("|u1", "|i1", "<u2", "<i2", "<u4", "<i4"),
}


def stored_dtypes(dtype: str) -> tuple[str, ...]:
    """Return the types in which values of a layer can be stored; the first that holds all values is used."""
    given = np.dtype(dtype)
    narrower = _NARROWER.get(given.kind, ())
    return (*(name for name in narrower if np.dtype(name).itemsize < given.itemsize), dtype)


def indices_dtype(n_vars: int) -> np.dtype[Any]:
    """Return the type of the numbers of `n_vars` columns."""
    dtype: np.dtype[Any] = smallest_uint(n_vars).newbyteorder("<")
    return dtype


@attrs.frozen(kw_only=True)
class Manifest:
    """The description of a snapshot and its files, without their data."""

    created_by: str = attrs.field(validator=TEXT)
    created_at: str = attrs.field(validator=TEXT)
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
            ValueError: If `folder` is not a snapshot, has a newer format, or the manifest was altered.
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
        """Raise a ValueError if names, sizes, types or rows in the manifest contradict each other.

        No other file is read. After this check, files of the right sizes can be mapped safely.
        """
        if wrong := next(self._contradictions(), None):
            raise ValueError(f"{str(folder / MANIFEST)!r} must fit together, but {wrong}; {WAY_OUT}")

    def check_files(self, folder: Path) -> None:
        """Raise a ValueError that names the first file that is missing, or has a wrong size or wrong ends."""
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


def content_from(fields: dict[str, Any]) -> Content:
    """Return the content from the fields that `attrs.asdict` made of it."""
    return Content(
        sources=tuple(Origin(**source) for source in fields["sources"]),
        n_vars=fields["n_vars"],
        var_digest=fields["var_digest"],
        layer_names=tuple(fields["layer_names"]),
        obs_column_names=tuple(fields["obs_column_names"]),
        obsm_names=tuple(fields["obsm_names"]),
    )


def shard_from(fields: dict[str, Any]) -> Shard:
    """Return the shard from the fields that `attrs.asdict` made of it."""
    files = {name: File(**fields[name]) for name in ("indptr", "indices", "data")}
    return Shard(**{**fields, **files})


def embedding_from(fields: dict[str, Any]) -> Embedding:
    """Return the array of `obsm` from the fields that `attrs.asdict` made of it."""
    return Embedding(**{**fields, "values": File(**fields["values"])})


def _from_fields(fields: dict[str, Any]) -> Manifest:
    return Manifest(
        created_by=fields["created_by"],
        created_at=fields["created_at"],
        content=content_from(fields["content"]),
        layers=tuple(
            Layer(**{**layer, "shards": tuple(shard_from(shard) for shard in layer["shards"])})
            for layer in fields["layers"]
        ),
        obsm=tuple(embedding_from(item) for item in fields["obsm"]),
        **{name: File(**fields[name]) for name in ("obs_joinids", "var_joinids", "obs", "var")},
    )
