"""`ShardWriter`: writes sorted rows of a layer to three files, in the smallest type that holds the values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._eager_iter import EagerMap
from tiledbsoma_ml._kernels.bits import as_bits
from tiledbsoma_ml.snapshot.blocks import BLOCK_ROWS, RowValues, write_blocks
from tiledbsoma_ml.snapshot.files import File, HashedFile, write_array
from tiledbsoma_ml.snapshot.segment import ShardRows
from tiledbsoma_ml.snapshot.shard import Blocks, stored_dtypes


class ShardWriter:
    """A writer of shards, which keeps values in memory until it knows the type that holds all of them.

    Args:
        folder: The folder of the files.
        dtype: Type of the layer.
        compression: Name of the compression; None to compress nothing.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any], compression: str | None) -> None:
        self._folder = folder
        self._dtype = dtype
        self._compression = compression
        self._waiting = np.empty(0, dtype=np.uint8)

    def write(self, name: str, rows: ShardRows) -> dict[str, Any]:
        """Write the rows of a shard; return the fields of its `Shard`, without the numbers of the rows."""
        paths = {array: self._folder / f"{name}.{array}" for array in ("indptr", "indices", "data", "blocks")}
        starts, kept = list[NDArray[np.int64]](), list[NDArray[Any]]()
        if len(self._waiting) < rows.nbytes:  # this is enough, unless values have many types
            self._waiting = np.empty(rows.nbytes, dtype=np.uint8)

        def columns() -> Iterator[RowValues]:
            n_bytes = 0
            for piece in rows.pieces:
                piece.sort_indices()
                starts.append(piece.indptr)
                kept.append(self._keep(piece.data, n_bytes))
                n_bytes += -(-kept[-1].nbytes // 8) * 8
                yield RowValues(piece.indptr, piece.indices)

        def values() -> Iterator[RowValues]:
            for row_starts, narrow in zip(starts, kept, strict=True):
                yield RowValues(row_starts, narrow.astype(data_dtype, copy=False))

        if self._compression is None:
            indices = _write_plain(paths["indices"], columns())
            data_dtype = common_dtype(kept, self._dtype)
            data, blocks = _write_plain(paths["data"], values()), {}
        else:
            write = partial(write_blocks, codec=self._compression, n_rows=BLOCK_ROWS)
            indices, table = write(paths["indices"], columns(), are_columns=True)
            data_dtype = common_dtype(kept, self._dtype)
            data, data_table = write(paths["data"], values(), are_columns=False)
            blocks = {"blocks": _describe_blocks(paths["blocks"], self._compression, table, data_table)}
        indptr = np.cumsum(np.concatenate([np.zeros(1, dtype=np.int64), *map(np.diff, starts)]))
        return {
            "nnz": int(indptr[-1]),
            "data_dtype": data_dtype.str,
            "indptr": write_array(paths["indptr"], [indptr]),
            "indices": indices,
            "data": data,
            **blocks,
        }

    def _keep(self, values: NDArray[Any], start: int) -> NDArray[Any]:
        """Return a copy of values in their narrowest type, in the memory that waits, from `start` on."""
        dtype = narrowest_dtype(values)
        end = start + len(values) * dtype.itemsize
        if end > len(self._waiting):  # views keep the old memory, with the values before
            self._waiting = np.empty(end + end // 4, dtype=np.uint8)
        kept = self._waiting[start:end].view(dtype)
        np.copyto(kept, values, casting="unsafe")
        return kept


def _write_plain(path: Path, pieces: Iterator[RowValues]) -> File:
    """Write columns or values as they are."""
    with (
        HashedFile(path) as file,
        EagerMap(file.write, (piece.values for piece in pieces), n_threads=1) as written,
    ):
        for _ in written:  # a piece is written while the next one is made
            pass
    return file.written


def _describe_blocks(
    path: Path, codec: str, of_columns: NDArray[np.int64], of_values: NDArray[np.int64]
) -> Blocks:
    """Write the table of blocks, from the ends and checksums of columns and of values."""
    table = np.stack([of_columns, of_values], axis=2).reshape(-1, 4)
    return Blocks(codec=codec, n_rows=BLOCK_ROWS, table=write_array(path, [table]))


def narrowest_dtype(values: NDArray[Any]) -> np.dtype[Any]:
    """Return the smallest type that holds all values exactly, also negative ones and fractions."""
    dtype = _narrow_dtype(values)
    if dtype == values.dtype and dtype.kind == "i" and len(values):
        low, high = values.min(), values.max()
        widths = (8, 16, 32, 64)
        return next(np.dtype(f"i{w // 8}") for w in widths if -(2 ** (w - 1)) <= low and high < 2 ** (w - 1))
    if dtype == np.float64:
        with np.errstate(over="ignore", invalid="ignore"):
            short = values.astype(np.float32)
        if (short.astype(np.float64).view(np.uint64) == values.view(np.uint64)).all():
            return short.dtype
    return dtype


def _narrow_dtype(values: NDArray[Any]) -> np.dtype[Any]:
    """Return the smallest type that holds the values exactly; for counts, an unsigned integer."""
    from tiledbsoma_ml._kernels import snapshot as kernels

    if not len(values) or values.dtype.itemsize == 1:
        return values.dtype
    if values.dtype.type in (np.float32, np.float64):
        holds_counts = kernels.are_counts(values, as_bits(values))
    else:
        holds_counts = values.dtype.kind in "iu" and values.min() >= 0
    for narrow in (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.uint32)):
        if holds_counts and values.max() <= np.iinfo(narrow).max and narrow.itemsize < values.dtype.itemsize:
            return narrow
    return values.dtype


def common_dtype(pieces: Sequence[NDArray[Any]], dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the smallest type that holds all values of a layer of `dtype`, given in narrow pieces."""
    *narrower, _ = map(np.dtype, stored_dtypes(dtype.str))
    return next((t for t in narrower if all(_holds(t, values) for values in pieces if len(values))), dtype)


def _holds(dtype: np.dtype[Any], values: NDArray[Any]) -> bool:
    """Return whether a type holds values of a narrowest type exactly."""
    if np.can_cast(values.dtype, dtype):
        return True
    if values.dtype.kind == "f":
        return False
    if dtype.kind == "f":
        return bool((values.astype(dtype).astype(np.float64) == values).all())
    limits = np.iinfo(dtype)
    return bool(limits.min <= values.min() and values.max() <= limits.max)
