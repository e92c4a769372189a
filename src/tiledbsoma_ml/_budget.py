"""`Budget`: a number of bytes of memory, and the shares that it is divided into."""

from __future__ import annotations

import math
import re
from numbers import Integral
from pathlib import Path

import attrs
import numpy as np

MIN_BUDGET = 64 * 2**20
"""Smallest budget that is accepted."""

FIXED_BYTES = 128 * 2**20
"""Memory of an open experiment, of columns of `obs` and of mini-batches that are read ahead, rounded up."""

MAX_STREAMS = 4
"""Largest number of streams in which a read from an object store is fetched."""

MALLOC_BYTES = 128 * 2**20
"""Freed memory that malloc keeps: of its own accord, or as told if the budget is 1 GiB or more."""

N_PIECES = 32
"""Number of pieces in which a window is given out. The memory of each is freed when it was given out."""

MAX_PIECES = 200
"""Largest number of pieces of a window in a file."""

PAGES_PER_PIECE = 16
"""Least number of pages of memory that hold a piece of a window, unless these would be tiny."""

EXTENTS_PER_PIECE = 16
"""Number of extents of a file that hold a piece of a window. The last extent is not full."""

FILE_SHARE = 1 + 2 / EXTENTS_PER_PIECE
"""Bytes of a file for each byte of two windows: one that is being filled, and one that is given out."""

EXPANSION = 5.0
"""Bytes of the pieces that are given out at once, for each byte of one piece while it waits."""

LEAST_SHARE = 0.55 / (1 + EXPANSION / N_PIECES)
"""Smallest share of each further byte of a budget that a window gets."""


def parse_bytes(name: str, value: object, minimum: int = MIN_BUDGET) -> int:
    """Return a number of bytes, given as a number or as a string like "2GiB".

    Raises:
        TypeError: If `value` is neither.
        ValueError: If the string is not a size, or the size is below `minimum`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral | str):
        raise TypeError(f"{name}={value!r} must be a number of bytes or a string; try {name}='2GiB'.")
    if isinstance(value, Integral):
        n_bytes = int(value)
    elif match := re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kmgt]?)(i?)b?\s*", value.lower()):
        number, prefix, binary = match.groups()
        n_bytes = round(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))
    else:
        raise ValueError(f"{name}={value!r} must be a number of bytes, with a unit or without; try '2GiB'.")
    if n_bytes < minimum:
        raise ValueError(f"{name}={value!r} must be at least {minimum // 2**20} MiB; try '2GiB'.")
    return n_bytes


@attrs.frozen
class Budget:
    """A memory budget and its shares: for TileDB, and for the rows of windows.

    Attributes:
        total: Bytes that reading may use in all.
        is_remote: Whether rows come from an object store or a server, where requests take long.
        mini_batch_bytes: Bytes of the total that mini-batches need which are made ahead.
        window_dir: Folder of the file that holds windows; None if memory holds them.
        window_budget: Bytes that this file may have.
        use_eager_fetch: Whether threads may read ahead.
    """

    total: int
    is_remote: bool = False
    mini_batch_bytes: int = 0
    window_dir: Path | None = None
    window_budget: int = 0
    use_eager_fetch: bool = True

    @property
    def streams(self) -> int:
        """Largest number of streams in which rows of a read are fetched at once, to hide latency."""
        return min(max(self.total // 2**29, 1), MAX_STREAMS) if self.is_remote else 1

    @property
    def tiledb(self) -> int:
        """Memory in which TileDB decodes tiles. It fetches as many at once as fit, which hides latency.

        Without its parallel merge, TileDB divides it equally among the fragments: with 16 fragments, reading
        in 64 MiB is a tenth slower than in 128 MiB.
        """
        share, most = (8, 256) if self.is_remote else (16, 128)
        return min(max(self.total // share, 16 * 2**20), most * 2**20)

    @property
    def tiledb_of_stream(self) -> int:
        """Memory in which TileDB decodes the tiles of one stream."""
        return max(self.tiledb // self.streams, 16 * 2**20)

    @property
    def buffer(self) -> int:
        """Size of one of TileDB's result buffers.

        A set has three, and each stream can have three sets at once.
        """
        return min(max(self.total // 128, 2**20), 8 * 2**20)

    @property
    def windows(self) -> int:
        """Memory that is left for the rows of all windows together."""
        fixed = min(FIXED_BYTES, self.total // 2)
        others = (
            self.tiledb + 9 * self.buffer * self.streams + fixed + self._malloc_bytes + self.mini_batch_bytes
        )
        return int(self.total * 0.95) - others

    def share_of_windows(self, n_bytes: int | None = None) -> WindowShare:
        """Return the share that windows get.

        Args:
            n_bytes: Bytes of all rows while they wait in windows; None if that is not known.
        """
        memory = self.windows
        if self.window_dir is None:
            planned = int(memory / (1 + EXPANSION / N_PIECES))
            return WindowShare(n_pieces=N_PIECES, n_bytes=memory, planned_bytes=planned)
        piece_bytes = max(1, memory // 5)
        largest = self.window_budget if n_bytes is None else min(self.window_budget, n_bytes)
        n_pieces = min(MAX_PIECES, max(N_PIECES, math.ceil(largest / piece_bytes)))
        file_bytes = min(self.window_budget, n_pieces * piece_bytes)
        held = int(file_bytes / FILE_SHARE)
        extent_bytes = _power_of_two(file_bytes // n_pieces // EXTENTS_PER_PIECE, 2**14, 2**22)
        return WindowShare(n_pieces=n_pieces, n_bytes=held, planned_bytes=held, extent_bytes=extent_bytes)

    @property
    def keeps_freed_memory(self) -> bool:
        """Whether the budget is large enough for `keep_freed_memory`."""
        return self.total >= 2**30

    @property
    def _malloc_bytes(self) -> int:
        return min(max((self.total - 2**28) // 4, 0), MALLOC_BYTES)


@attrs.frozen(kw_only=True)
class WindowShare:
    """The share of a budget that windows get.

    Attributes:
        n_pieces: Number of pieces in which a window is given out.
        n_bytes: Bytes that all windows may hold together.
        planned_bytes: Bytes that a read should hold, and a window if its size is "auto".
        extent_bytes: Size of the extents of the file that holds windows.
    """

    n_pieces: int
    n_bytes: int
    planned_bytes: int
    extent_bytes: int = 0

    @property
    def given_out_bytes(self) -> int:
        """Bytes of the pieces that are given out at once."""
        return int(EXPANSION * self.planned_bytes / self.n_pieces)

    @property
    def page_bytes(self) -> int:
        """Size of the pages of memory that hold windows; the last page of a piece is not full."""
        return _power_of_two(self.n_bytes // self.n_pieces // PAGES_PER_PIECE, 2**8, 2**18)


def _power_of_two(size: int, least: int, most: int) -> int:
    """Return the largest power of two up to `size`, but not below `least` nor above `most`."""
    return min(max(1 << max(size.bit_length() - 1, 0), least), most)


def keep_freed_memory() -> None:
    """Let malloc keep up to 64 MiB of freed memory for the next blocks of up to 32 MiB.

    TileDB allocates and frees its buffers all the time. At first, glibc gets each from the operating system,
    which takes longer than filling it; with this setting a scan takes 0.7 of the time or less. The memory
    that malloc keeps is part of the budget. glibc changes to this setting by itself when a block of 32 MiB is
    freed (mallopt(3), M_MMAP_THRESHOLD). So this function allocates such a block, without writing to it, and
    frees it. Other mallocs, and sizes that the environment sets, are not changed.
    """
    np.empty(2**25 - 2**16, dtype=np.uint8)
