from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher
from numpy.typing import NDArray

from tiledbsoma_ml._kernels import csr, window
from tiledbsoma_ml._kernels.bits import as_bits

Arrays: TypeAlias = tuple[NDArray[np.generic], ...]

N_ROWS, N_COLS = 400, 900

# Entries of a matrix with unique coordinates, in random order, and the same with rows in order.
_rng = np.random.default_rng(0)
ROWS, COLS = np.divmod(_rng.permutation(N_ROWS * N_COLS)[: N_ROWS * N_COLS // 3], N_COLS)
DATA = _rng.random(len(ROWS), dtype=np.float32)
INDPTR = np.concatenate([[0], np.cumsum(np.bincount(ROWS, minlength=N_ROWS))])
BY_ROW = np.argsort(ROWS, kind="stable")
BY_ROW_AND_COL = np.lexsort((COLS, ROWS))
INDICES = COLS[BY_ROW].astype(np.uint16)

# The same entries as a layer gives them, in runs of one row, with counts as values; and what is wanted: four
# of five rows, and two of three columns in another order.
DIM_0, DIM_1 = ROWS[BY_ROW] * 5 + 2, COLS[BY_ROW]
SORTED_IDS = np.unique(DIM_0)[np.arange(N_ROWS) % 5 != 4]
IS_RUN = np.isin(np.unique(DIM_0), SORTED_IDS)
STARTS, STOPS = (borders[IS_RUN].astype(np.int32) for borders in (INDPTR[:-1], INDPTR[1:]))
RUN_ROWS = np.arange(len(SORTED_IDS), dtype=np.int32)
COL_OF = np.where(np.arange(N_COLS) % 3 == 0, -1, np.arange(N_COLS)[::-1]).astype(np.int32)
FIRST_COL, LAST_COL = 50, 800  # those before and after are not wanted, and are nowhere in the table
COL_OF[:FIRST_COL] = COL_OF[LAST_COL + 1 :] = -1
TABLE = COL_OF[FIRST_COL : LAST_COL + 1].copy()
LENGTHS = np.array([(COL_OF[DIM_1[a:b]] >= 0).sum() for a, b in zip(STARTS, STOPS, strict=True)], np.int32)
COUNTS = _rng.integers(0, 256, len(DIM_1)).astype(np.float32)
WANTED = np.isin(DIM_0, SORTED_IDS) & (COL_OF[DIM_1] >= 0)


def count_rows() -> Arrays:
    counts = np.ones(N_ROWS, dtype=np.int64)
    csr.count_rows(ROWS, counts)
    return (counts,)


def place_rows() -> Arrays:
    free, indices, data = INDPTR[:-1].copy(), np.empty_like(INDICES), np.empty_like(DATA)
    csr.place_rows(ROWS, COLS, as_bits(DATA), free, indices, as_bits(data))
    return free, indices, data


def find_runs() -> Arrays:
    rows, starts, stops = (np.empty(len(DIM_0), dtype=np.int32) for _ in range(3))
    n_runs = window.find_runs(DIM_0, SORTED_IDS, rows, starts, stops)
    return rows[:n_runs], starts[:n_runs], stops[:n_runs]


def count_wanted() -> Arrays:
    lengths = np.full(len(STARTS), -1, dtype=np.int32)
    window.count_wanted(DIM_1, FIRST_COL, TABLE, STARTS, STOPS, lengths)
    return (lengths,)


def count_nonzeros() -> Arrays:
    lengths = np.full(len(LINES), -1, dtype=np.int32)
    window.count_nonzeros(dense(), LINES, COL_OF, lengths)
    return (lengths,)


def copy_nonzeros() -> Arrays:
    lengths = KEPT.sum(axis=1)
    begins = np.cumsum(lengths) - lengths
    cols, kept = np.empty(lengths.sum(), dtype=np.uint16), np.empty(lengths.sum(), dtype=np.float32)
    window.copy_nonzeros(dense(), LINES, COL_OF, begins, cols, kept)
    return cols, kept


def are_counts() -> Arrays:
    answers = []
    for dtype in (np.float32, np.float64):
        for value in (7, 0, np.inf, 0.5, -0.0, -1, np.nan, -np.inf):
            values = np.array([1, 2, value, 3], dtype=dtype)
            answers.append(window.are_counts(values, as_bits(values)))
    return (np.array(answers),)


def copy_runs() -> Arrays:
    begins = np.cumsum(LENGTHS) - LENGTHS
    cols, kept = np.empty(LENGTHS.sum(), dtype=np.uint16), np.empty(LENGTHS.sum(), dtype=np.uint8)
    window.copy_runs(DIM_1, COUNTS, FIRST_COL, TABLE, STARTS, STOPS, begins, cols, kept)
    return cols, kept


def add_lengths() -> Arrays:
    counts = np.ones(len(SORTED_IDS), dtype=np.int32)
    rows = np.concatenate([RUN_ROWS, RUN_ROWS[::-1]])  # a row may have more than one run
    window.add_lengths(rows, np.concatenate([LENGTHS, LENGTHS[::-1]]), counts)
    return (counts,)


def place_runs() -> Arrays:
    order = np.random.default_rng(1).permutation(N_ROWS)
    entries = np.concatenate([np.arange(*INDPTR[row : row + 2]) for row in order])
    free, indices, data = INDPTR[:-1].copy(), np.empty_like(INDICES), np.empty_like(DATA)
    lengths = np.diff(INDPTR)[order].astype(np.int32)
    values = COUNTS.astype(np.uint8)[entries]
    window.place_runs(order.astype(np.int32), lengths, INDICES[entries], values, free, indices, data)
    return free, indices, data


def fill_dense() -> Arrays:
    out = np.zeros((N_ROWS, N_COLS), dtype=np.float32)
    csr.fill_dense(INDPTR, INDICES, as_bits(DATA[BY_ROW]), as_bits(out))
    return (out,)


def sort_rows() -> Arrays:
    indices, data = INDICES.copy(), DATA[BY_ROW]
    csr.sort_rows(INDPTR, indices, as_bits(data))
    return indices, data


def has_repeats() -> Arrays:
    """Ask whether a column is there twice: in no row, in the last of many, in sorted rows, in none at all."""
    twice, in_order = INDICES.copy(), COLS[BY_ROW_AND_COL].astype(np.uint16)
    twice[-1] = twice[INDPTR[-2]]
    twice_in_order = in_order.copy()
    twice_in_order[-1] = twice_in_order[-2]
    many = (INDICES, twice, in_order, twice_in_order, INDICES[:0])
    borders = [INDPTR] * 4 + [INDPTR[:1]]
    return (np.array([csr.has_repeats(p, i, N_COLS) for p, i in zip(borders, many, strict=True)]),)


def dense() -> NDArray[np.float32]:
    out = np.zeros((N_ROWS, N_COLS), dtype=np.float32)
    out[ROWS, COLS] = DATA
    return out


LINES = np.array([7, 0, 399, 7], dtype=np.int32)
NONZERO = dense()[LINES] != 0
KEPT = NONZERO & (COL_OF >= 0)

DEFINITIONS: list[tuple[Callable[[], Arrays], Arrays]] = [
    (count_rows, (1 + np.bincount(ROWS, minlength=N_ROWS),)),
    (place_rows, (INDPTR[1:], INDICES, DATA[BY_ROW])),
    (find_runs, (RUN_ROWS, STARTS, STOPS)),
    (count_wanted, (LENGTHS,)),
    (count_nonzeros, (KEPT.sum(axis=1),)),
    (copy_nonzeros, (np.broadcast_to(COL_OF, NONZERO.shape)[KEPT], dense()[LINES][KEPT])),
    (are_counts, (np.array(2 * [True, True, True, False, False, False, False, False]),)),
    (copy_runs, (COL_OF[DIM_1][WANTED], COUNTS[WANTED])),
    (add_lengths, (1 + 2 * LENGTHS,)),
    (place_runs, (INDPTR[1:], INDICES, COUNTS)),
    (fill_dense, (dense(),)),
    (sort_rows, (COLS[BY_ROW_AND_COL], DATA[BY_ROW_AND_COL])),
    (has_repeats, (np.array([False, True, False, True, False]),)),
]


def kernels() -> dict[str, Dispatcher]:
    found = vars(csr) | vars(window)
    return {name: value for name, value in found.items() if isinstance(value, Dispatcher)}


def test_every_kernel_is_defined_here() -> None:
    assert sorted(kernels()) == sorted(kernel.__name__ for kernel, _ in DEFINITIONS)


@pytest.mark.parametrize(
    ("kernel", "expected"), DEFINITIONS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_kernel_gives_what_defines_it_in_several_threads_at_once(
    kernel: Callable[[], Arrays], expected: Arrays
) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = [future.result() for future in [pool.submit(kernel) for _ in range(8)]]
    for found in results:
        for array, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(array, wanted)


def test_threads_may_fill_the_halves_of_one_matrix_at_once() -> None:
    out, bits = np.zeros((N_ROWS, N_COLS), dtype=np.float32), as_bits(DATA[BY_ROW])
    half = N_ROWS // 2

    def fill(start: int, stop: int) -> None:
        csr.fill_dense(INDPTR[start : stop + 1], INDICES, bits, as_bits(out[start:stop]))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill, [0, half], [half, N_ROWS]))
    np.testing.assert_array_equal(out, dense())


def test_runs_are_found_in_any_order_of_rows_and_of_a_row_more_than_once() -> None:
    dim_0 = np.array([7, 7, 3, 9, 9, 9, 4, 3, 3, 10, 0])
    found = np.empty((3, len(dim_0)), dtype=np.int32)
    n_runs = window.find_runs(dim_0, np.array([3, 7, 9]), *found)
    assert found[:, :n_runs].T.tolist() == [[1, 0, 2], [0, 2, 3], [2, 3, 6], [0, 7, 9]]


def test_other_threads_run_while_a_kernel_does() -> None:
    rows = np.broadcast_to(np.int64(0), 100_000_000)  # a tenth of a second of counting, in eight bytes

    def sees_a_count_in_progress() -> bool:
        counts = np.zeros(1, dtype=np.int64)
        counting = pool.submit(csr.count_rows, rows, counts)
        seen = False
        while not (seen or counting.done()):
            seen = 0 < counts[0] < len(rows)
        counting.result()
        return seen

    # One look may come too late on a busy machine; with the GIL held none of many could succeed.
    with ThreadPoolExecutor(1) as pool:
        assert any(sees_a_count_in_progress() for _ in range(20))


def test_every_kernel_releases_the_gil_and_leaves_threads_to_the_caller() -> None:
    for kernel in kernels().values():
        assert kernel.targetoptions["nogil"] is True
        assert not kernel.targetoptions.get("parallel", False)


def test_every_kernel_is_kept_on_disk() -> None:
    for name, kernel in kernels().items():
        assert kernel.stats.cache_path, name
