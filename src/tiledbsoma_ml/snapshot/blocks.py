"""Blocks of rows of a shard, whose columns and values are compressed: how one is written, and read.

`docs/snapshot_format.md` specifies them to the byte, and says why they are what they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import attrs
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from tiledbsoma_ml._eager_iter import EagerMap
from tiledbsoma_ml._kernels.bits import as_bits
from tiledbsoma_ml._rebatch import rebatch
from tiledbsoma_ml.snapshot.files import File, HashedFile, damaged, little_endian_bytes, map_file
from tiledbsoma_ml.snapshot.shard import Shard

BLOCK_ROWS = 64
"""Number of rows of a block, which is that of the default shuffle chunks: a chunk is one block."""

LEVEL = 1
"""Level of zstd. Higher ones take longer, and make blocks hardly smaller."""

MAX_THREADS = 8
"""Largest number of threads that encode or decode. In a worker, torch has one thread, and so has this."""

BLOCKS_PER_TASK = 4
"""Number of blocks that a thread decodes at a time."""

_S = TypeVar("_S")
_T = TypeVar("_T")

_CODECS = {"zstd": pa.Codec("zstd", compression_level=LEVEL)}


@attrs.frozen(eq=False)
class RowValues:
    """The columns, or the values, of consecutive rows.

    Attributes:
        starts: Row starts, from 0.
        values: The columns or values of all rows, one row after the other.
    """

    starts: NDArray[np.int64]
    values: NDArray[Any]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.starts) - 1

    def slice(self, start: int, stop: int) -> RowValues:
        """Return the rows from `start` to `stop`."""
        first, last = self.starts[start], self.starts[stop]
        return RowValues(self.starts[start : stop + 1] - first, self.values[first:last])

    @staticmethod
    def concat(parts: Sequence[RowValues]) -> RowValues:
        """Return the rows of all parts."""
        if len(parts) == 1:
            return parts[0]
        lengths = [np.diff(part.starts) for part in parts]
        starts = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        return RowValues(starts, np.concatenate([part.values for part in parts]))


def write_blocks(
    path: Path, pieces: Iterator[RowValues], codec: str, n_rows: int, *, are_columns: bool
) -> tuple[File, NDArray[np.int64]]:
    """Write the columns, or the values, of a shard in compressed blocks.

    Args:
        path: The new file.
        pieces: All rows of the shard, in pieces of any size.
        codec: Name of the compression.
        n_rows: Number of rows of a block.
        are_columns: Whether these are columns.

    Returns:
        The file, and the end and the CRC-32 of each block; int64, of shape (n_blocks, 2).
    """

    def encoded(block: RowValues) -> tuple[NDArray[np.int64], bytes]:
        return block.starts, encode(codec, block, are_columns=are_columns)

    blocks = map(RowValues.concat, rebatch(pieces, n_rows, RowValues.slice))
    table, first, end = [np.empty((0, 2), dtype=np.int64)], 0, 0
    with HashedFile(path) as file, EagerMap(encoded, blocks, n_threads()) as ahead:
        for starts, compressed in ahead:
            file.write(np.frombuffer(compressed, dtype=np.uint8))
            end += len(compressed)
            table.append(np.array([[end, checksum(compressed, first + starts)]]))
            first += int(starts[-1])
    return file.written, np.concatenate(table)


def encode(codec: str, block: RowValues, *, are_columns: bool) -> bytes:
    """Return the columns, or the values, of a block as compressed bytes; none if there are no entries."""
    from tiledbsoma_ml._kernels import blocks as kernels

    if not len(block.values):
        return b""
    n = len(block.values)
    bits = as_bits(block.values)
    planes = np.empty(n_plane_bytes(n, bits.itemsize, are_columns=are_columns), dtype=np.uint8)
    if are_columns:
        kernels.split_columns(block.starts, bits, planes)
    else:
        kernels.split_values(bits.view(f"u{min(4, bits.itemsize)}"), planes)
    compressed: bytes = _CODECS[codec].compress(planes, asbytes=True)
    return compressed


def n_plane_bytes(n: int, width: int, *, are_columns: bool) -> int:
    """Return the bytes of the planes of a block with `n` columns or values of so many bytes.

    A value of eight bytes counts as two of four bytes.
    """
    if are_columns:
        return n * width
    narrow = min(4, width)
    return 2 * narrow * ((n * width // narrow + 1) // 2)


def checksum(compressed: bytes | memoryview, starts: NDArray[np.int64]) -> int:
    """Return the CRC-32 of the row starts of a block in its shard, followed by compressed bytes."""
    return zlib.crc32(compressed, zlib.crc32(little_endian_bytes(starts)))


@attrs.frozen(kw_only=True, eq=False)
class Block:
    """The rows of a block, decoded.

    Attributes:
        starts: Row starts in the shard.
        indices: The columns of these rows, one row after the other.
        data: Their values.
    """

    starts: NDArray[np.int64]
    indices: NDArray[Any]
    data: NDArray[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.starts.nbytes + self.indices.nbytes + self.data.nbytes


class BlockFiles:
    """The mapped files of a compressed shard; several threads may decode blocks at once.

    Args:
        folder: Folder of the snapshot.
        shard: The shard, from a manifest that was checked.
        indices_dtype: Type of the columns.
        row_starts: The mapped row starts of the shard, which were checked.
    """

    def __init__(self, folder: Path, shard: Shard, indices_dtype: str, row_starts: NDArray[np.int64]) -> None:
        assert shard.blocks is not None
        self.n_rows = shard.blocks.n_rows
        self.indices_dtype, self.data_dtype = np.dtype(indices_dtype), np.dtype(shard.data_dtype)
        self._folder, self._shard, self._codec = folder, shard, _CODECS[shard.blocks.codec]
        self._row_starts = row_starts
        self._table = map_file(folder, shard.blocks.table, "<i8").reshape(-1, 4)
        self._indices = map_file(folder, shard.indices, "|u1")
        self._data = map_file(folder, shard.data, "|u1")

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._table)

    def decode(self, number: int) -> Block:
        """Return all rows of a block.

        Raises:
            ValueError: If a file is damaged.
        """
        starts = self._starts(number)
        n = int(starts[-1] - starts[0])
        indices, data = np.empty(n, self.indices_dtype), np.empty(n, self.data_dtype)
        self._decode(number, starts, np.arange(len(starts) - 1), indices, data)
        return Block(starts=starts, indices=indices, data=data)

    def decode_rows(
        self, number: int, rows: NDArray[np.int64], indices: NDArray[Any], data: NDArray[Any]
    ) -> None:
        """Write columns and values of some rows of a block, one row after the other.

        Args:
            number: The block.
            rows: The rows, as numbers in the block, which must exist.
            indices: The columns, in the type of the layer, with the length of these rows.
            data: The values, in the type of the shard, with the same length.

        Raises:
            ValueError: If a file is damaged.
        """
        self._decode(number, self._starts(number), rows, indices, data)

    def changed(self) -> ValueError:
        """Return the error for row starts that changed after they were checked."""
        return damaged(self._folder, self._shard.indptr, "must not change while it is read, but did")

    def first_bad_row(self, n_vars: int) -> int:
        """Decode all blocks; return the first row with columns that do not exist or do not ascend, or -1.

        Raises:
            ValueError: If a file is damaged.
        """
        from tiledbsoma_ml._kernels import snapshot as kernels

        def bad_row_of(number: int) -> int:
            block = self.decode(number)
            wrong = kernels.first_bad_row(block.starts - block.starts[0], block.indices, n_vars)
            return wrong if wrong < 0 else number * self.n_rows + wrong

        bad_rows = list(on_threads(bad_row_of, range(len(self))))
        ends = self._table[-1, :2].tolist()
        for file, end in zip((self._shard.indices, self._shard.data), ends, strict=True):
            if end != file.nbytes:
                raise damaged(self._folder, file, f"must end with its last block, after {end:,} bytes")
        return next((row for row in bad_rows if row >= 0), -1)

    def _starts(self, number: int) -> NDArray[np.int64]:
        """Return row starts of a block in the shard, as a copy that cannot change any more."""
        from tiledbsoma_ml._kernels import snapshot as kernels

        first = number * self.n_rows
        starts = self._row_starts[first : first + self.n_rows + 1].copy()
        if starts[0] < 0 or starts[-1] > self._shard.nnz or kernels.first_descent(starts, False) >= 0:
            raise self.changed()
        return starts

    def _decode(
        self,
        number: int,
        starts: NDArray[np.int64],
        rows: NDArray[np.int64],
        indices: NDArray[Any],
        data: NDArray[Any],
    ) -> None:
        from tiledbsoma_ml._kernels import blocks as kernels

        own = starts - starts[0]
        if int((own[rows + 1] - own[rows]).sum()) != len(indices):
            raise self.changed()
        before = self._table[number - 1, :2].tolist() if number else [0, 0]
        *ends, indices_crc, data_crc = self._table[number].tolist()
        shard, n = self._shard, int(own[-1])
        first_row = shard.row_start + number * self.n_rows
        for file, mapped, start, end, crc, out in (
            (shard.indices, self._indices, before[0], ends[0], indices_crc, indices),
            (shard.data, self._data, before[1], ends[1], data_crc, data),
        ):
            what = f"the block of rows that begins with row {first_row:,}"
            if not 0 <= start <= end <= len(mapped):
                raise damaged(self._folder, file, f"must have {what} within it, but has not")
            compressed = mapped[start:end].data
            if checksum(compressed, starts) != crc:
                raise damaged(self._folder, file, f"must have {what} as it was written, but has it altered")
            n_bytes = n_plane_bytes(n, out.itemsize, are_columns=out is indices)
            planes, bits = self._decompressed(file, compressed, n_bytes, what), as_bits(out)
            if out is indices:
                kernels.join_columns(planes, own, rows, bits)
            else:
                width = 2 * min(4, bits.itemsize)
                pairs = np.empty(n_bytes // width, dtype=f"u{width}")
                kernels.join_values(planes, pairs)
                kernels.take_rows(pairs.view(bits.dtype)[:n], own, rows, bits)

    def _decompressed(self, file: File, compressed: memoryview, n_bytes: int, what: str) -> NDArray[np.uint8]:
        if not n_bytes and not len(compressed):
            return np.empty(0, dtype=np.uint8)
        try:
            return np.frombuffer(self._codec.decompress(compressed, n_bytes), dtype=np.uint8)
        except (pa.ArrowException, OSError, ValueError) as err:
            rule = f"must have {what} with {n_bytes:,} bytes when decompressed, but has not"
            raise damaged(self._folder, file, rule) from err


def n_threads() -> int:
    """Return the number of threads that encode or decode blocks in this process."""
    return min(torch.get_num_threads(), MAX_THREADS)


def on_threads(function: Callable[[_S], _T], blocks: Sequence[_S]) -> Iterator[_T]:
    """Yield the result of a function for each block; several are computed at once, if there are many."""
    tasks = [blocks[k : k + BLOCKS_PER_TASK] for k in range(0, len(blocks), BLOCKS_PER_TASK)]
    n = min(n_threads(), len(tasks))
    if n <= 1:
        yield from map(function, blocks)
        return
    with EagerMap(lambda task: list(map(function, task)), iter(tasks), n) as results:
        for found in results:
            yield from found
