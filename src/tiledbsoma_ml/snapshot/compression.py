"""The choice of "auto" whether `X` is compressed, for which cold reads of a sample are measured."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import attrs
import numpy as np

from tiledbsoma_ml._common import warn
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml.snapshot.blocks import BlockFiles, n_threads, on_threads
from tiledbsoma_ml.snapshot.files import fsync, map_file, open_plain
from tiledbsoma_ml.snapshot.format import Manifest
from tiledbsoma_ml.snapshot.segment import ShardRows
from tiledbsoma_ml.snapshot.shard import CODECS, Shard
from tiledbsoma_ml.snapshot.shards import ShardWriter

Compression: TypeAlias = Literal["zstd", "auto"]
"""Name of a compression, or "auto" for the one with which cold reads are fastest."""

SAMPLE = "sample"
"""Name of the folder in which rows are written both ways."""

SAMPLE_BYTES = 2**26
"""Memory of these rows."""

LEAST_GAIN = 0.9
"""Rows are compressed if a cold read takes less than this share of the time."""

BUFFER_BYTES = 2**20
"""Number of bytes that are read at once."""


def check_compression(compression: object) -> None:
    """Raise a ValueError unless this is None, the name of a compression, or "auto"."""
    if compression not in (None, "auto", *CODECS):
        raise ValueError(f"compression={compression!r} must be None, 'zstd' or 'auto'; try 'zstd'.")


def warn_of_other(path: Path, asked: str | None, manifest: Manifest) -> None:
    """Warn if a snapshot that was made before, or by others, is not compressed as it was asked for."""
    if asked in CODECS and manifest.content.n_obs and manifest.layers[0].compression != asked:
        warn(
            f"compression={asked!r} changes nothing here: path={str(path)!r} has this query already, not "
            "compressed; remove it to make it anew."
        )


@attrs.frozen(kw_only=True)
class Choice:
    """A compression that was chosen, and why.

    Attributes:
        compression: Name of the compression; None to compress nothing.
        reason: The reason, in words.
    """

    compression: str | None
    reason: str


@attrs.frozen(kw_only=True)
class Cost:
    """The cost of a non-zero in a cold read.

    Attributes:
        read_ns: Time of reading it from the disk.
        decode_ns: Time of decoding it, with all threads that decode.
        n_bytes: Its bytes on the disk.
    """

    read_ns: float
    decode_ns: float
    n_bytes: float

    @property
    def ns(self) -> float:
        """Time of reading and decoding, which happen at once."""
        return max(self.read_ns, self.decode_ns)


def choose(plain: Cost | None, compressed: Cost | None, codec: str) -> Choice:
    """Return the better way: not compressed, or compressed; a cost is None if it could not be measured."""
    if plain is None or compressed is None:
        reason = "files stay in memory on this disk, as on tmpfs, so none is read cold, and nothing is gained"
        return Choice(compression=None, reason=reason)
    reason = (
        f"a cold read of a non-zero takes {plain.ns:.1f} ns not compressed ({plain.n_bytes:.2f} bytes), and "
        f"{compressed.ns:.1f} ns by {codec} ({compressed.n_bytes:.2f} bytes: {compressed.read_ns:.1f} ns to "
        f"read, and meanwhile {compressed.decode_ns:.1f} ns to decode on {n_threads()} threads)"
    )
    is_better = compressed.ns < LEAST_GAIN * plain.ns
    return Choice(compression=codec if is_better else None, reason=reason)


def measure(folder: Path, pieces: Sequence[CSR_IO_Buffer], dtype: str, indices_dtype: str) -> Choice:
    """Return the compression for a disk, and for rows like these.

    Args:
        folder: A folder on the disk, in which the rows are written both ways; it is made and removed.
        pieces: Rows of a layer.
        dtype: Type of the layer.
        indices_dtype: Type of its columns.
    """
    codec = CODECS[0]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        plain, compressed = (_write(folder, name, pieces, dtype) for name in (None, codec))
        return choose(_cost(folder, plain, indices_dtype), _cost(folder, compressed, indices_dtype), codec)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, compression: str | None, pieces: Sequence[CSR_IO_Buffer], dtype: str) -> Shard:
    writer = ShardWriter(folder, np.dtype(dtype), compression)
    rows = ShardRows(nbytes=sum(piece.nbytes for piece in pieces), pieces=iter(pieces))
    n_rows = sum(map(len, pieces))
    return Shard(row_start=0, row_stop=n_rows, **writer.write(f"sample-{compression}", rows))


def _cost(folder: Path, shard: Shard, indices_dtype: str) -> Cost | None:
    files = shard.indices, shard.data
    seconds = [_cold_read_s(folder / file.name) for file in files]
    if None in seconds:
        return None
    n = max(1, shard.nnz)
    decode_s = 0.0 if shard.blocks is None else _decode_s(folder, shard, indices_dtype)
    return Cost(
        read_ns=1e9 * sum(s for s in seconds if s is not None) / n,
        decode_ns=1e9 * decode_s / n,
        n_bytes=sum(file.nbytes for file in files) / n,
    )


def _cold_read_s(path: Path) -> float | None:
    """Return the seconds in which a file is read from the disk; None if it stays in memory."""
    fsync(path)
    with open_plain(path) as file:
        descriptor, buffer = file.fileno(), bytearray(BUFFER_BYTES)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(descriptor, [buffer], 0, os.RWF_NOWAIT)
        except BlockingIOError:  # it would have to wait for the disk
            start = time.perf_counter()
            while os.readv(descriptor, [buffer]):
                pass
            return time.perf_counter() - start
        except OSError:
            pass
        return None


def _decode_s(folder: Path, shard: Shard, indices_dtype: str) -> float:
    """Return the seconds in which all blocks are decoded into memory that was used before, as in an epoch."""
    starts = map_file(folder, shard.indptr, "<i8")
    files = BlockFiles(folder, shard, indices_dtype, starts)
    indices, data = np.empty(shard.nnz, indices_dtype), np.empty(shard.nnz, shard.data_dtype)

    def decode(number: int) -> None:
        first = number * files.n_rows
        last = min(first + files.n_rows, shard.n_rows)
        entries = slice(*starts[[first, last]].tolist())
        files.decode_rows(number, np.arange(last - first), indices[entries], data[entries])

    seconds = []
    for _ in range(2):  # the first time, memory is new, and loops may have to be compiled
        start = time.perf_counter()
        for _ in on_threads(decode, range(len(files))):
            pass
        seconds.append(time.perf_counter() - start)
    return min(seconds)
