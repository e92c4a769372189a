"""`Shard`: consecutive rows of a layer in files, and the types and sizes that these can have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import ceil
from pathlib import Path

import attrs
import numpy as np

from tiledbsoma_ml.snapshot.files import COUNT, TEXT, File, damaged

ENDINGS = (".indptr", ".indices", ".data", ".blocks")
"""Endings of the names of the files of a shard; only a compressed one has the last."""

CODECS = ("zstd",)
"""Names of the compressions that a shard can have."""

MAX_BLOCK_ROWS = 4096
"""Largest number of rows of a block."""

MAX_EXPANSION = 2**15
"""Largest number of bytes that a byte of zstd can stand for: it has at least 4 bytes for each 128 KiB."""


@attrs.frozen(kw_only=True)
class Blocks:
    """The blocks of rows of a shard, whose columns and values are compressed.

    Attributes:
        codec: Name of the compression, one of `CODECS`.
        n_rows: Number of rows of a block. The last one may have fewer.
        table: File with four numbers for each block: the end of its columns and of its values in the files of
            the shard, and the CRC-32 of both; int64, of shape (n_blocks, 4).
    """

    codec: str = attrs.field(validator=TEXT)
    n_rows: int = attrs.field(validator=COUNT)
    table: File

    def contradictions(self, n_rows: int) -> Iterator[str]:
        """Yield, in words, contradictions within the blocks, or with the number of rows of their shard."""
        name = self.table.name
        if self.codec not in CODECS:
            yield f"{name} has the codec {self.codec!r}, not {' or '.join(map(repr, CODECS))}"
        elif not 1 <= self.n_rows <= MAX_BLOCK_ROWS:
            yield f"{name} has blocks of {self.n_rows:,} rows, not of 1 to {MAX_BLOCK_ROWS:,}"
        else:
            yield from other_size(self.table, 4 * ceil(n_rows / self.n_rows), "<i8")


@attrs.frozen(kw_only=True)
class Shard:
    """Consecutive rows of a layer in CSR, in three files, or in four if they are compressed.

    Attributes:
        row_start: The first row.
        row_stop: The row after the last one.
        nnz: Number of stored values.
        data_dtype: Type of the stored values.
        indptr: File of the row starts; int64, of shape (n_rows + 1,).
        indices: File of the columns, which ascend within a row.
        data: File of the values.
        blocks: The blocks in which columns and values are compressed; None if they are not.
    """

    row_start: int = attrs.field(validator=COUNT)
    row_stop: int = attrs.field(validator=COUNT)
    nnz: int = attrs.field(validator=COUNT)
    data_dtype: str = attrs.field(validator=TEXT)
    indptr: File
    indices: File
    data: File
    blocks: Blocks | None = None

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.row_stop - self.row_start

    @property
    def files(self) -> tuple[File, ...]:
        """The three or four files."""
        plain = self.indptr, self.indices, self.data
        return plain if self.blocks is None else (*plain, self.blocks.table)

    @property
    def compression(self) -> str | None:
        """Name of the compression; None if the shard is not compressed."""
        return None if self.blocks is None else self.blocks.codec

    def is_named(self, name: str) -> bool:
        """Return whether its files have this name, each with its ending."""
        return all(file.name == name + ending for file, ending in zip(self.files, ENDINGS, strict=False))

    def contradictions(self, dtype: str, indices_dtype: str, n_vars: int) -> Iterator[str]:
        """Yield, in words, contradictions within the shard, or with the types and columns of its layer."""
        name = self.data.name
        if self.data_dtype not in stored_dtypes(dtype):
            yield f"{name} has values of {self.data_dtype!r}, in which {dtype!r} is not kept"
        elif self.nnz > self.n_rows * n_vars:
            yield f"{name} has more values than {self.n_rows:,} rows of {n_vars:,} columns"
        else:
            yield from other_size(self.indptr, self.n_rows + 1, "<i8")
            check = other_size if self.blocks is None else too_small
            yield from check(self.indices, self.nnz, indices_dtype)
            yield from check(self.data, self.nnz, self.data_dtype)
            if self.blocks is not None:
                yield from self.blocks.contradictions(self.n_rows)

    def check_ends(self, folder: Path) -> None:
        """Raise a ValueError unless `indptr` begins with 0 and ends with the number of stored values."""
        with self.indptr.open(folder) as file:
            ends = b"".join(os.pread(file.fileno(), 8, offset) for offset in (0, self.indptr.nbytes - 8))
        first, last = np.frombuffer(ends, "<i8").tolist()
        if (first, last) != (0, self.nnz):
            raise damaged(folder, self.indptr, f"must lead from 0 to {self.nnz:,}, not {first} to {last}")


def other_size(file: File, n: int, dtype: str) -> Iterator[str]:
    """Yield, in words, that a file does not have the size of `n` values."""
    n_bytes = n * np.dtype(dtype).itemsize
    if file.nbytes != n_bytes:
        yield f"{file.name} has {file.nbytes:,} bytes, not the {n_bytes:,} of {n:,} values of {dtype!r}"


def too_small(file: File, n: int, dtype: str) -> Iterator[str]:
    """Yield, in words, that a file has fewer bytes than `n` values have that are compressed."""
    n_bytes = n * np.dtype(dtype).itemsize
    if n_bytes > MAX_EXPANSION * file.nbytes:
        yield f"{file.name} has {file.nbytes:,} bytes, too few for {n:,} compressed values of {dtype!r}"


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
