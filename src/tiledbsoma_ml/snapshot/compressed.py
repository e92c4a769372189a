"""`CompressedLayer`: a layer in compressed blocks, which are decoded when rows of them are asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import attrs
import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._batch.gather import LocatedRows, ShardArrays
from tiledbsoma_ml._batch.pool import Pool
from tiledbsoma_ml._threads import hold_at_forks
from tiledbsoma_ml.snapshot.blocks import Block, BlockFiles, on_threads
from tiledbsoma_ml.snapshot.format import Layer
from tiledbsoma_ml.snapshot.layer import RowStarts

CACHE_BYTES = 2**25
"""Memory of decoded blocks that is kept for later rows."""


@attrs.frozen(kw_only=True, eq=False)
class _Wanted:
    """The rows that are asked for, each once, in the order of the files.

    Attributes:
        shards: The shard of each row.
        in_shard: Each row, counted from the first one of its shard.
        starts: Row starts of these rows, concatenated.
        of_row: For each row that was asked for, its index among these.
        borders: Index of the first of these rows in each block, and their number.
    """

    shards: NDArray[np.int32]
    in_shard: NDArray[np.int64]
    starts: NDArray[np.int64]
    of_row: NDArray[np.int64]
    borders: NDArray[np.int64]


class CompressedLayer:
    """A layer in compressed blocks; see `Shards`.

    If rows lie in a few blocks, whole blocks are decoded, and kept for a while. If they lie in many, each
    block is decoded once, and nothing is kept but the rows that were asked for.

    Args:
        folder: Folder of the snapshot.
        layer: The layer, from a manifest that was checked.
        n_vars: Number of columns.
        cache_bytes: Memory of decoded blocks that is kept for later rows.
    """

    def __init__(self, folder: Path, layer: Layer, n_vars: int, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.dtype = np.dtype(layer.dtype)
        self.indices_dtype = np.dtype(layer.indices_dtype)
        self.n_vars = n_vars
        self._starts = RowStarts(folder, layer, n_vars)
        self._files = [
            BlockFiles(folder, shard, layer.indices_dtype, starts)
            for shard, starts in zip(layer.shards, self._starts.maps, strict=True)
        ]
        self._block_rows = np.array([files.n_rows for files in self._files], dtype=np.int64)
        self._first_blocks = np.cumsum([0, *map(len, self._files)])
        self._block_bytes = layer.held_row_bytes * layer.block_rows
        self._cache = _Cache(cache_bytes)

    def locate(self, rows: NDArray[np.int64], pool: Pool) -> LocatedRows:
        """Return the places of rows, which must exist, after decoding them.

        Args:
            rows: The rows.
            pool: Memory for the rows, if they lie in many blocks.

        Raises:
            ValueError: If a file is damaged.
        """
        shards, begins, indptr = self._starts.find(rows)
        wanted = self._wanted(rows, shards, indptr)
        if (len(wanted.borders) - 1) * self._block_bytes <= self._cache.n_bytes / 2:
            return self._in_whole_blocks(rows, wanted, begins, indptr)
        return self._alone(rows, wanted, indptr, pool)

    def check_columns(self, located: LocatedRows, wrong: int) -> None:
        """Raise a ValueError if the row with the index `wrong` has a column that does not exist."""
        self._starts.check_columns(located, wrong)

    def _wanted(
        self, rows: NDArray[np.int64], shards: NDArray[np.int32], indptr: NDArray[np.int64]
    ) -> _Wanted:
        ascending, first, of_row = np.unique(rows, return_index=True, return_inverse=True)
        shards = shards[first]
        in_shard = ascending - self._starts.borders[shards]
        blocks = self._first_blocks[shards] + in_shard // self._block_rows[shards]
        return _Wanted(
            shards=shards,
            in_shard=in_shard,
            starts=np.concatenate([[0], np.cumsum(np.diff(indptr)[first])]),
            of_row=of_row,
            borders=np.append(np.flatnonzero(np.diff(blocks, prepend=-1)), len(blocks)),
        )

    def _in_whole_blocks(
        self,
        rows: NDArray[np.int64],
        wanted: _Wanted,
        begins: NDArray[np.int64],
        indptr: NDArray[np.int64],
    ) -> LocatedRows:
        """Return the places of rows in whole blocks, which are taken from the cache, or decoded."""
        firsts = wanted.borders[:-1]
        blocks = list(on_threads(self._block, [self._number(wanted, at) for at in firsts.tolist()]))
        n_rows_each = np.diff(wanted.borders)
        block_of_row = np.arange(len(blocks), dtype=np.int32).repeat(n_rows_each)[wanted.of_row]
        begins = begins - np.array([block.starts[0] for block in blocks], dtype=np.int64)[block_of_row]
        sizes = np.array([len(block.data) for block in blocks], dtype=np.int64)[block_of_row]
        is_wrong = (begins < 0) | (begins + np.diff(indptr) > sizes)
        if is_wrong.any():
            raise self._files[wanted.shards[wanted.of_row[is_wrong][0]]].changed()
        arrays = ShardArrays(
            [block.indices for block in blocks], [block.data for block in blocks], self.dtype
        )
        return LocatedRows(rows, block_of_row, begins, indptr, arrays)

    def _alone(
        self, rows: NDArray[np.int64], wanted: _Wanted, indptr: NDArray[np.int64], pool: Pool
    ) -> LocatedRows:
        """Return the places of rows that are decoded into arrays with nothing else."""
        used, first, array_of = np.unique(wanted.shards, return_index=True, return_inverse=True)
        bases = wanted.starts[first]
        sizes = np.diff(np.append(bases, wanted.starts[-1])).tolist()
        indices = [pool.empty(n, self.indices_dtype) for n in sizes]
        data = [pool.empty(n, self._files[s].data_dtype) for s, n in zip(used.tolist(), sizes, strict=True)]

        def decode(rows_of_block: tuple[int, int]) -> None:
            start, stop = rows_of_block
            shard, number = self._number(wanted, start)
            array, files = array_of[start], self._files[shard]
            entries = slice(*(wanted.starts[[start, stop]] - bases[array]).tolist())
            own = wanted.in_shard[start:stop] - number * files.n_rows
            files.decode_rows(number, own, indices[array][entries], data[array][entries])

        for _ in on_threads(decode, list(pairwise(wanted.borders.tolist()))):
            pass
        array_of_row = array_of[wanted.of_row].astype(np.int32)
        begins = wanted.starts[wanted.of_row] - bases[array_of_row]
        return LocatedRows(rows, array_of_row, begins, indptr, ShardArrays(indices, data, self.dtype))

    def _number(self, wanted: _Wanted, at: int) -> tuple[int, int]:
        """Return the shard of the row with an index, and the block there."""
        shard = int(wanted.shards[at])
        return shard, int(wanted.in_shard[at]) // self._files[shard].n_rows

    def _block(self, number: tuple[int, int]) -> Block:
        found = self._cache.get(number)
        if found is None:
            shard, block = number
            found = self._files[shard].decode(block)
            self._cache.put(number, found)
        return found


class _Cache:
    """Decoded blocks that were used last; several threads may use this.

    Args:
        n_bytes: Largest number of bytes that are kept.
    """

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._blocks: OrderedDict[tuple[int, int], Block] = OrderedDict()
        self._used = 0

    def get(self, number: tuple[int, int]) -> Block | None:
        """Return a block; None if it is not here."""
        with _cache_lock:
            if number in self._blocks:
                self._blocks.move_to_end(number)
            return self._blocks.get(number)

    def put(self, number: tuple[int, int], block: Block) -> None:
        """Keep a block, and drop those that were used longest ago."""
        with _cache_lock:
            if number not in self._blocks:
                self._blocks[number] = block
                self._used += block.nbytes
            while self._used > self.n_bytes:
                _, dropped = self._blocks.popitem(last=False)
                self._used -= dropped.nbytes


_cache_lock = threading.Lock()
"""One lock for all caches, so that a fork can wait for it."""

hold_at_forks(_cache_lock)
