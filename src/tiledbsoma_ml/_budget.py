"""Budgets of memory and of disk space: how they are written, where their bytes go, and what is kept."""

from __future__ import annotations

import math
import re
from numbers import Integral
from pathlib import Path

import attrs
import numpy as np

MIN_BUDGET = 64 * 2**20
"""The smallest budget that is accepted."""

FIXED_BYTES = 128 * 2**20
"""Memory of an open experiment, columns of `obs` and mini-batches that are read ahead, with some to spare."""

KEPT_BYTES = 128 * 2**20
"""Freed memory that malloc may keep, where there is room for it: from a budget of 1 GiB on."""

N_PARTS = 32
"""In how many parts the rows of a window are given out, and what they held is freed."""

MAX_PARTS = 200
"""The same for windows in files."""

EXTENTS_PER_PART = 16
"""A part of a window in a file is kept in so many stretches of it, of which the last one is not full."""

FILE_SHARE = 1 + 2 / EXTENTS_PER_PART
"""Bytes of a file for each byte of two windows: one that is filled, and one that is given out."""

EXPANSION = 5.0
"""Bytes of the parts of a window that are given out at once, for each byte of one of them while it waits."""

LEAST_SHARE = 0.55 / (1 + EXPANSION / N_PARTS)
"""A window gets at least this much of a byte that is added to a budget."""


def parse_bytes(name: str, value: object, minimum: int = MIN_BUDGET) -> int:
    """Return a number of bytes, given as one or as a string like "2GiB".

    Raises:
        TypeError: If it is neither.
        ValueError: If it cannot be read, or is below `minimum`.
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
    """The shares of a memory budget: one for TileDB, and what is left for rows that wait.

    Attributes:
        total: All bytes that reading may take.
        is_remote: Whether rows come from an object store or a server, where requests take long.
        mini_batch_bytes: Bytes, of these, for mini-batches that are made ahead.
        window_dir: Folder where windows wait in a file; in memory if None.
        window_budget: Bytes that this file may take.
        use_eager_fetch: Whether threads may read ahead.
    """

    total: int
    is_remote: bool = False
    mini_batch_bytes: int = 0
    window_dir: Path | None = None
    window_budget: int = 0
    use_eager_fetch: bool = True

    @property
    def tiledb(self) -> int:
        """Memory in which TileDB decodes tiles: as many as fit are fetched at once, which hides latency.

        Without its parallel merge, each fragment gets an equal share of it: with 16 fragments, 64 MiB read
        slower by a tenth than 128 MiB.
        """
        share, most = (8, 256) if self.is_remote else (16, 128)
        return min(max(self.total // share, 16 * 2**20), most * 2**20)

    @property
    def buffer(self) -> int:
        """Size of one of TileDB's result buffers; there are three, of which three sets can be alive."""
        return min(max(self.total // 128, 2**20), 8 * 2**20)

    @property
    def windows(self) -> int:
        """Memory that is left for rows that wait, all windows together."""
        fixed = min(FIXED_BYTES, self.total // 2)
        others = self.tiledb + 9 * self.buffer + fixed + self._kept + self.mini_batch_bytes
        return int(self.total * 0.95) - others

    def share_of_windows(self, n_bytes: int | None = None) -> WindowShare:
        """Return how windows wait.

        Args:
            n_bytes: Bytes that all rows take up while they wait, where that is known.
        """
        memory = self.windows
        if self.window_dir is None:
            planned = int(memory / (1 + EXPANSION / N_PARTS))
            return WindowShare(n_parts=N_PARTS, n_bytes=memory, planned_bytes=planned)
        part_bytes = max(1, memory // 5)
        largest = self.window_budget if n_bytes is None else min(self.window_budget, n_bytes)
        n_parts = min(MAX_PARTS, max(N_PARTS, math.ceil(largest / part_bytes)))
        file_bytes = min(self.window_budget, n_parts * part_bytes)
        held = int(file_bytes / FILE_SHARE)
        extent_bytes = _power_of_two(file_bytes // n_parts // EXTENTS_PER_PART)
        return WindowShare(n_parts=n_parts, n_bytes=held, planned_bytes=held, extent_bytes=extent_bytes)

    @property
    def keeps_freed_memory(self) -> bool:
        """Whether there is room for what malloc keeps: see `keep_freed_memory`."""
        return self._kept == KEPT_BYTES

    @property
    def _kept(self) -> int:
        return min(max((self.total - 2**29) // 4, 0), KEPT_BYTES)


@attrs.frozen(kw_only=True)
class WindowShare:
    """How the rows of windows wait.

    Attributes:
        n_parts: In how many parts a window is given out.
        n_bytes: Bytes that windows may hold together.
        planned_bytes: Bytes that a window may hold where its size is "auto".
        extent_bytes: Size of the stretches that a file of windows consists of.
    """

    n_parts: int
    n_bytes: int
    planned_bytes: int
    extent_bytes: int = 0


def _power_of_two(size: int) -> int:
    """Return the largest power of two up to `size`, within the sizes that are written well."""
    return 1 << min(max(size.bit_length() - 1, 14), 22)


def keep_freed_memory() -> None:
    """Let malloc keep memory of up to 64 MiB that was freed, for the next block of up to 32 MiB.

    TileDB allocates and frees its buffers all the time. At first, glibc asks the operating system for each,
    which takes longer than to fill them; with this a scan takes 0.7 of the time or less. What is kept is paid
    for from the budget. It is what glibc comes to by itself once a block of 32 MiB was freed (mallopt(3),
    M_MMAP_THRESHOLD), so one is: nothing is written to it. Other mallocs, and sizes that the environment
    sets, stay as they are.
    """
    np.empty(2**25 - 2**16, dtype=np.uint8)
