"""`ShardWriter`: writes sorted rows of a layer to three files, in the smallest type that holds the values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._eager_iter import EagerMap
from tiledbsoma_ml._kernels.bits import as_bits
from tiledbsoma_ml.snapshot.files import HashedFile, write_array
from tiledbsoma_ml.snapshot.format import stored_dtypes
from tiledbsoma_ml.snapshot.segment import ShardRows


class ShardWriter:
    """A writer of shards, which keeps values in memory until it knows the type that holds all of them."""

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        self._folder = folder
        self._dtype = dtype
        self._waiting = np.empty(0, dtype=np.uint8)

    def write(self, name: str, rows: ShardRows) -> dict[str, Any]:
        """Write the rows of a shard; return the fields of its `Shard`, without the numbers of the rows."""
        paths = {array: self._folder / f"{name}.{array}" for array in ("indptr", "indices", "data")}
        lengths, kept = [np.zeros(1, dtype=np.int64)], []
        if len(self._waiting) < rows.nbytes:  # this is enough, unless values have many types
            self._waiting = np.empty(rows.nbytes, dtype=np.uint8)

        def sorted_indices() -> Iterator[NDArray[Any]]:
            n_bytes = 0
            for piece in rows.pieces:
                piece.sort_indices()
                lengths.append(np.diff(piece.indptr))
                if piece.nnz:
                    kept.append(self._keep(piece.data, n_bytes))
                    n_bytes += -(-kept[-1].nbytes // 8) * 8
                yield piece.indices

        with (
            HashedFile(paths["indices"]) as indices,
            EagerMap(indices.write, sorted_indices(), n_threads=1) as written,
        ):
            for _ in written:  # the columns of a piece are written while the next piece is sorted
                pass
        data_dtype = common_dtype(kept, self._dtype)
        with HashedFile(paths["data"]) as data:
            for values in kept:
                data.write(values.astype(data_dtype, copy=False))
        indptr = np.cumsum(np.concatenate(lengths))
        return {
            "nnz": int(indptr[-1]),
            "data_dtype": data_dtype.str,
            "indptr": write_array(paths["indptr"], [indptr]),
            "indices": indices.written,
            "data": data.written,
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
    return next((t for t in narrower if all(_holds(t, values) for values in pieces)), dtype)


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
