"""Entries of a layer, in tables as they arrive, and the rows of it that are wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._kernels.bits import as_bits
from tiledbsoma_ml._soma.held_rows import Columns, HeldRows
from tiledbsoma_ml._soma.stores import Extents, Pages

UNSIGNED = [np.dtype(t) for t in (np.uint8, np.uint16, np.uint32, np.uint64)]
SIGNED = [np.dtype(t) for t in (np.int8, np.int16, np.int32, np.int64)]
FLOATS = [np.dtype(t) for t in (np.float32, np.float64)]

Table = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]


def palettes(dtype: np.dtype[Any]) -> list[list[Any]]:
    """Return values of a table: all counts up to a limit, or something that is no count among them."""
    limits = [1, 255, 256, 65_535, 65_536, 2**24 + 2, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**64 - 1]
    if dtype.kind == "f":
        counts = [[0, 1, 7, limit] for limit in limits[:9]]
        return [*counts, [1, 0.5], [3, -0.0], [2, -1], [4, np.nan], [5, np.inf], [6, -np.inf], [1e-45, 1.5]]
    info = np.iinfo(dtype)
    counts = [[0, 1, 7, limit] for limit in limits if limit <= info.max]
    return [*counts, [info.min, 0, info.max], [info.max // 2, 3], [max(info.min, -1), 1]]


class Layer(NamedTuple):
    """Entries of a layer, in tables as they arrive, and which of its rows and columns are wanted."""

    tables: list[Table]
    dtype: np.dtype[Any]
    obs_joinids: NDArray[np.int64]
    var_joinids: NDArray[np.int64]

    def dense(self) -> NDArray[Any]:
        """Return what is wanted, by definition."""
        out = np.zeros((len(self.obs_joinids), len(self.var_joinids)), dtype=self.dtype)
        entries = {}
        for table in self.tables:
            entries |= {(i, j): value for i, j, value in zip(*table, strict=True)}
        for row, i in enumerate(self.obs_joinids.tolist()):
            for col, j in enumerate(self.var_joinids.tolist()):
                out[row, col] = entries.get((i, j), 0)
        return out

    def window(self, **options: Any) -> HeldRows:
        return HeldRows(self.obs_joinids, Columns(self.var_joinids), self.dtype, **options)

    def filled(self, **options: Any) -> HeldRows:
        window = self.window(**options)
        for table in self.tables:
            window.add(*table)
        return window


@st.composite
def layers(draw: st.DrawFn, dtypes: list[np.dtype[Any]] = UNSIGNED + SIGNED + FLOATS) -> Layer:
    """Draw rows with gaps between them, entries in any order and any number of tables, and what is wanted."""
    dtype, n_cols = draw(st.sampled_from(dtypes)), draw(st.integers(1, 9))
    scale, col_scale = draw(st.sampled_from([1, 5, 2**40])), draw(st.sampled_from([1, 3, 2**40]))
    rows = scale * np.array(draw(st.lists(st.integers(0, 30), unique=True, max_size=15)), dtype=np.int64)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    i, j = np.nonzero(rng.random((len(rows), n_cols)) < draw(st.sampled_from([0.1, 0.5, 1.0])))
    order = rng.permutation(len(i)) if draw(st.booleans()) else np.arange(len(i))
    cuts = sorted(draw(st.lists(st.integers(0, len(i)), max_size=4)))
    tables = []
    for part in np.split(order, cuts):
        values = rng.choice(np.array(draw(st.sampled_from(palettes(dtype))), dtype=dtype), len(part))
        tables.append((rows[i[part]], col_scale * j[part], values))
    wanted = draw(st.lists(st.integers(0, 32), min_size=1, max_size=40))
    columns = (
        draw(st.lists(st.integers(0, n_cols - 1), unique=True)) if draw(st.booleans()) else range(n_cols)
    )
    return Layer(tables, dtype, scale * np.array(wanted), col_scale * np.array(columns, dtype=np.int64))


def random_layer(seed: int, n_tables: int = 5) -> Layer:
    """Return a layer that fills many small pages, in tables of counts or of fractions; all is wanted."""
    n_rows, n_cols, rng = 300, 200, np.random.default_rng(seed)
    i, j = np.nonzero(rng.random((n_rows, n_cols)) < 0.2)
    by_tile = np.lexsort((j, i, j // 50, i // 64))
    tables = []
    for part in np.array_split(by_tile, n_tables):
        values = rng.integers(1, rng.choice([200, 300, 70_000]), len(part)) * rng.choice([1, 0.5])
        tables.append((i[part], j[part], values.astype(np.float32)))
    return Layer(tables, np.dtype(np.float32), rng.permutation(n_rows), rng.permutation(n_cols))


def as_rows(part: CSR_IO_Buffer) -> NDArray[Any]:
    return part.slice_tonumpy(slice(None))


def put_together(parts: list[CSR_IO_Buffer]) -> NDArray[Any]:
    return np.concatenate([as_rows(part) for part in parts])


def assert_same_bits(found: NDArray[Any], expected: NDArray[Any]) -> None:
    """Assert equality that tells -0.0 from 0.0, and takes NaN as equal to itself."""
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(as_bits(found), as_bits(expected))


def store_in(folder: Path | None, **sizes: int) -> Pages | Extents:
    """Return where rows wait: in memory, or in a file whose extents hold a few of them."""
    return Pages(**sizes) if folder is None else Extents(folder, 2**10)


SMALL_PAGES = {"page_bytes": 2**12, "slab_bytes": 2**14}


def rows_of_counts(n_rows: int, first: int = 0) -> Layer:
    """Return a layer whose rows have four entries each, in one table."""
    i, j = np.divmod(np.arange(4 * n_rows), 4)
    order = np.random.default_rng(first).permutation(n_rows)
    counts = (i + j + first) % 250
    return Layer(
        [(i + first, j, counts.astype(np.float32))], np.dtype(np.float32), order + first, np.arange(4)
    )
