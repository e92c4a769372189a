from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba.core.dispatcher import Dispatcher

from tiledbsoma_ml._kernels import snapshot as kernels
from tiledbsoma_ml._kernels.bits import as_bits

# Rows of three shards whose values have different types.
_rng = np.random.default_rng(0)
N_ROWS, N_COLS = 60, 300
DENSE = np.where(_rng.random((N_ROWS, N_COLS)) < 0.2, _rng.integers(1, 200, (N_ROWS, N_COLS)), 0)
STARTS = np.array([0, 10, 45])
BORDERS = np.append(STARTS, N_ROWS)
TYPES = ["|u1", "<u2", "<f4"]


def shard(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    X = DENSE[STARTS[number] : [*STARTS, N_ROWS][number + 1]]
    indptr = np.concatenate([[0], np.cumsum((X != 0).sum(1))])
    return indptr, X.nonzero()[1].astype(np.uint16), X[X != 0].astype(TYPES[number])


SHARDS = [shard(number) for number in range(3)]
INDPTR_AT, INDICES_AT, DATA_AT = (
    np.array([arrays[k].ctypes.data for arrays in SHARDS], dtype=np.int64) for k in range(3)
)
N_VALUES = np.array([len(indices) for _, indices, _ in SHARDS])
INDICES_KINDS = np.full(3, kernels.KINDS["<u2"], dtype=np.uint8)
DATA_KINDS = np.array([kernels.KINDS[name] for name in TYPES], dtype=np.uint8)
ROWS = _rng.integers(0, N_ROWS, 200)


def located() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = np.empty(200, np.int32), np.empty(200, np.int64), np.empty(201, np.int64)
    assert kernels.locate_rows(ROWS, BORDERS, INDPTR_AT, N_VALUES, *found) == -1
    return found


def gathered(dtype: str = "float32") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    *where, indptr = located()
    indices, data = np.empty(indptr[-1], np.uint32), np.empty(indptr[-1], dtype)
    assert kernels.gather_columns(*where, indptr, INDICES_AT, INDICES_KINDS, N_COLS, indices) == -1
    kernels.gather_rows(*where, indptr, DATA_AT, DATA_KINDS, data)
    return indptr, indices, data


def to_dense(indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, n_cols: int = N_COLS) -> np.ndarray:
    out = np.zeros((len(indptr) - 1, n_cols))
    out[np.repeat(np.arange(len(out)), np.diff(indptr)), indices[: indptr[-1]]] = data[: indptr[-1]]
    return out


def are_counts() -> None:
    for dtype in (np.float32, np.float64):
        for value, expected in (
            (7, 1),
            (0, 1),
            (np.inf, 1),
            (0.5, 0),
            (-0.0, 0),
            (-1, 0),
            (np.nan, 0),
            (-np.inf, 0),
        ):
            values = np.array([1, 2, value, 3], dtype=dtype)
            assert kernels.are_counts(values, as_bits(values)) == bool(expected)


def locate_rows() -> None:
    shards, begins, indptr = located()
    for k, row in enumerate(ROWS.tolist()):
        number = int((row >= STARTS).sum() - 1)
        borders = SHARDS[number][0][row - STARTS[number] :][:2]
        assert (shards[k], begins[k]) == (number, borders[0])
        assert indptr[k + 1] - indptr[k] == borders[1] - borders[0]


def gather_columns() -> None:
    *where, indptr = located()
    for dtype in (np.uint16, np.uint32):
        out = np.empty(indptr[-1], dtype)
        assert kernels.gather_columns(*where, indptr, INDICES_AT, INDICES_KINDS, N_COLS, out) == -1
        np.testing.assert_array_equal(out, gathered()[1])


def first_descent() -> None:
    for values, strict, expected in (
        ([], True, -1),
        ([5], True, -1),
        ([0, 0, 3, 3, 9], False, -1),
        ([0, 0, 3, 3, 9], True, 1),
        ([1, 2, 2, 1], True, 2),
        ([1, 2, 2, 1], False, 3),
        ([-(2**63), 2**63 - 1, -(2**63)], True, 2),
    ):
        assert kernels.first_descent(np.array(values, dtype=np.int64), strict) == expected


def first_bad_row() -> None:
    for indptr, indices, _ in SHARDS:
        assert kernels.first_bad_row(indptr, indices, N_COLS) == -1
        row = len(indptr) // 2
        for place, column in ((indptr[row + 1] - 1, N_COLS), (indptr[row], indices[indptr[row] + 1])):
            wrong = indices.copy()
            wrong[place] = column
            assert kernels.first_bad_row(indptr, wrong, N_COLS) == row
        assert kernels.first_bad_row(indptr * 1000, indices, N_COLS) <= 0, "rows that are not there"


def gather_rows() -> None:
    for dtype in ("float32", "float64", "uint16", "uint64"):
        np.testing.assert_array_equal(to_dense(*gathered(dtype)), DENSE[ROWS])


def find_rows() -> None:
    sorted_joinids = np.unique(_rng_of(1).integers(-500, 5000, 300))
    asked = _rng_of(2).integers(-600, 5100, 1000)
    for shift in (0, 3, 14):
        span = sorted_joinids[-1] - sorted_joinids[0] + 1
        starts = sorted_joinids[0] + (np.arange((span - 1 >> shift) + 2) << shift)
        rows = np.empty(1000, dtype=np.int64)
        n_missing = kernels.find_rows(
            asked, sorted_joinids, np.searchsorted(sorted_joinids, starts), shift, rows
        )
        is_there = np.isin(asked, sorted_joinids)
        np.testing.assert_array_equal(rows, np.where(is_there, np.searchsorted(sorted_joinids, asked), -1))
        assert n_missing == (~is_there).sum()


def keep_columns() -> None:
    indptr, indices, data = gathered()
    columns = _rng_of(3).permutation(N_COLS)[:100]
    col_of = np.full(N_COLS, -1, dtype=np.int32)
    col_of[columns] = np.arange(100)
    kernels.keep_columns(indptr, col_of, indices, data.view(np.uint32))
    np.testing.assert_array_equal(to_dense(indptr, indices, data, 100), DENSE[ROWS][:, columns])


def sort_rows_of_few() -> None:
    indptr, indices, data = gathered()
    for a, b in pairwise(indptr):
        order = _rng_of(4).permutation(b - a)
        indices[a:b], data[a:b] = indices[a:b][order], data[a:b][order]
    kernels.sort_rows_of_few(indptr, N_COLS, indices, data.view(np.uint32))
    expected = gathered()
    np.testing.assert_array_equal(indices, expected[1])
    np.testing.assert_array_equal(data, expected[2])


def fill_rows() -> None:
    shards, begins, indptr = located()
    longest = np.diff(indptr).max()
    columns = _rng_of(5).permutation(N_COLS)[:100]
    some = np.full(N_COLS, -1, dtype=np.int32)
    some[columns] = np.arange(100)
    for col_of, expected in ((np.empty(0, np.int32), DENSE[ROWS]), (some, DENSE[ROWS][:, columns])):
        indices, data = np.empty(longest, np.uint16), np.empty(longest, np.float32)
        out = np.full(expected.shape, 7, dtype=np.float32)
        wrong = kernels.fill_rows(
            shards,
            begins,
            indptr,
            INDICES_AT,
            INDICES_KINDS,
            DATA_AT,
            DATA_KINDS,
            col_of,
            indices,
            data,
            data.view(np.uint32),
            out.view(np.uint32),
        )
        assert wrong == -1
        np.testing.assert_array_equal(out, expected)


def _rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


CHECKS = [
    are_counts,
    find_rows,
    first_descent,
    first_bad_row,
    locate_rows,
    gather_columns,
    gather_rows,
    keep_columns,
    sort_rows_of_few,
    fill_rows,
]


def dispatchers() -> dict[str, Dispatcher]:
    return {name: value for name, value in vars(kernels).items() if isinstance(value, Dispatcher)}


def test_every_loop_is_checked_here() -> None:
    public = {name for name in dispatchers() if not name.startswith("_")}
    assert public == {check.__name__ for check in CHECKS}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_loop_does_what_numpy_does_in_several_threads_at_once(check: Callable[[], None]) -> None:
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(check) for _ in range(8)]:
            future.result()


def test_every_loop_releases_the_gil_is_kept_on_disk_and_leaves_threads_to_the_caller() -> None:
    for name, loop in dispatchers().items():
        assert loop.targetoptions["nogil"] is True
        assert not loop.targetoptions.get("parallel", False)
        assert bool(loop.stats.cache_path) is not name.startswith("_"), name


@given(columns=st.sets(st.integers(0, 199)))
def test_columns_are_sorted_whatever_bits_they_set(columns: set[int]) -> None:
    indices = np.array(sorted(columns, key=lambda k: k * 7919 % 211), dtype=np.uint32)
    bits = indices * 3
    kernels.sort_rows_of_few(np.array([0, len(indices)]), 200, indices, bits)
    assert indices.tolist() == sorted(columns)
    assert bits.tolist() == [3 * column for column in sorted(columns)]


@pytest.mark.parametrize("name", [*kernels.KINDS, "<f8", "<i8", "<u8"])
def test_values_of_every_stored_type_are_given_out(name: str) -> None:
    values = np.array([1, 2, 3, 100, 127], dtype=name)
    out = np.empty(5, dtype="f8" if values.dtype.kind == "f" else "u8")
    kernels.gather_rows(
        np.zeros(1, np.int32),
        np.zeros(1, np.int64),
        np.array([0, 5]),
        np.array([values.ctypes.data]),
        np.array([kernels.KINDS.get(name, kernels.AS_GIVEN_OUT)], dtype=np.uint8),
        out,
    )
    np.testing.assert_array_equal(out, [1, 2, 3, 100, 127])


# What files must not hold ---------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [-1, N_ROWS, 2**62])
def test_rows_that_are_not_there_are_not_looked_up(row: int) -> None:
    out = np.empty(2, np.int32), np.empty(2, np.int64), np.empty(3, np.int64)
    assert kernels.locate_rows(np.array([3, row]), BORDERS, INDPTR_AT, N_VALUES, *out) == 1


@pytest.mark.parametrize(("place", "value"), [(4, -1), (4, 2**62), (5, 0), (4, 10**6)])
def test_rows_that_would_lie_outside_of_their_shard_are_told(place: int, value: int) -> None:
    starts = SHARDS[0][0].copy()
    starts[place] = value
    at, out = INDPTR_AT.copy(), (np.empty(1, np.int32), np.empty(1, np.int64), np.empty(2, np.int64))
    at[0] = starts.ctypes.data
    assert kernels.locate_rows(np.array([4]), BORDERS, at, N_VALUES, *out) == 0


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("beyond", [N_COLS, N_COLS + 1, 65_535])
def test_columns_that_are_not_there_are_told_and_never_written_to(dtype: type, beyond: int) -> None:
    stored, data = np.arange(40, dtype=dtype), np.ones(40, np.float32)
    stored[33] = beyond
    shards, begins, indptr = np.zeros(2, np.int32), np.array([0, 20]), np.array([0, 20, 40])
    at, data_at = (np.array([array.ctypes.data]) for array in (stored, data))
    kinds = np.array([kernels.KINDS[stored.dtype.str]], np.uint8)
    out = np.empty(40, np.uint32)
    assert kernels.gather_columns(shards, begins, indptr, at, kinds, N_COLS, out) == 1
    guarded = np.full((4, N_COLS), 7, np.float32)
    scratch, values = np.empty(20, np.uint32), np.empty(20, np.float32)
    where, types = (shards, begins, indptr, at, kinds), np.array([kernels.KINDS["<f4"]], np.uint8)
    for col_of in (np.empty(0, np.int32), np.arange(N_COLS, dtype=np.int32)):
        bits = values.view(np.uint32), guarded[:2].view(np.uint32)
        assert kernels.fill_rows(*where, data_at, types, col_of, scratch, values, *bits) == 1
        assert (guarded[2:] == 7).all()


def test_joinids_in_no_order_are_looked_up_within_their_bounds() -> None:
    for first_rows in ([0, 5, 5], [5, 5, 5], [0, 3]):
        rows = np.empty(4, dtype=np.int64)
        joinids, asked = np.array([1, 90, 3, 2, 100]), np.array([1, 100, 99, 3])
        kernels.find_rows(asked, joinids, np.array(first_rows), 6, rows)
        assert ((rows == -1) | (joinids[rows] == asked)).all()
