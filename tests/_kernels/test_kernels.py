from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher
from numpy.typing import NDArray

from tiledbsoma_ml._kernels import csr, hold, place
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

# The same entries as a layer gives them, in runs of one row; and what is wanted: four of five rows, the first
# of them twice, and two of three columns in another order.
DIM_0, DIM_1 = ROWS[BY_ROW] * 5 + 2, COLS[BY_ROW]
COUNTS = _rng.integers(0, 256, len(DIM_1)).astype(np.float32)
WANTED_IDS = np.unique(DIM_0)[np.arange(N_ROWS) % 5 != 4]
WANTED_ROWS = np.append(0, _rng.permutation(len(WANTED_IDS)))  # for each row that is held, its index there
COL_OF = np.where(np.arange(N_COLS) % 3 == 0, -1, np.arange(N_COLS)[::-1]).astype(np.int32)
FIRST_COL, LAST_COL = 50, 800  # those before and after are not wanted, and are nowhere in the table
COL_OF[:FIRST_COL] = COL_OF[LAST_COL + 1 :] = -1
N_PIECES, PAGE_BYTES = 7, 2**12


def count_rows() -> Arrays:
    counts = np.ones(N_ROWS, dtype=np.int64)
    csr.count_rows(ROWS, counts)
    return (counts,)


def place_rows() -> Arrays:
    free, indices, data = INDPTR[:-1].copy(), np.empty_like(INDICES), np.empty_like(DATA)
    csr.place_rows(ROWS, COLS, as_bits(DATA), free, indices, as_bits(data))
    return free, indices, data


def wanted(*, all_columns: bool = False) -> hold.Wanted:
    n_rows = len(WANTED_ROWS)
    order = np.argsort(WANTED_ROWS, kind="stable").astype(np.int32)
    firsts = np.append(np.searchsorted(WANTED_ROWS[order], np.arange(len(WANTED_IDS))), n_rows)
    return hold.Wanted(
        joinids=WANTED_IDS,
        firsts=firsts.astype(np.int32),
        order=order,
        borders=np.linspace(0, n_rows, N_PIECES + 1).astype(np.int32),
        first_key=0 if all_columns else FIRST_COL,
        col_of=np.arange(N_COLS, dtype=np.int32) if all_columns else COL_OF[FIRST_COL : LAST_COL + 1].copy(),
        n_in_order=N_COLS if all_columns else 0,
        col_bytes=2,
    )


def filling(n_rows: int = len(WANTED_ROWS), n_pieces: int = N_PIECES) -> hold.Filling:
    return hold.Filling(
        counts=np.zeros(n_rows, dtype=np.int32),
        pages=np.zeros(n_pieces, dtype=np.int64),
        ends=np.full(n_pieces, PAGE_BYTES),
        page_bytes=PAGE_BYTES,
        codes=np.zeros(n_pieces, dtype=np.uint8),
        kept=np.empty(PAGE_BYTES, dtype=np.uint32),
        done=np.zeros(4, dtype=np.int64),
    )


def entries() -> hold.Entries:
    return hold.Entries(dim_0=DIM_0, keys=DIM_1, values=COUNTS, bits=as_bits(COUNTS))


Page: TypeAlias = tuple[NDArray[np.uint64], int]


def pages_of(given: hold.Entries, wanted: hold.Wanted, filling: hold.Filling) -> list[list[Page]]:
    """Return the pages of each piece, as they are filled, with the number of bytes that are used of each."""
    pages: list[list[Page]] = [[] for _ in filling.pages]
    current = {}
    while (piece := hold.hold_entries(given, wanted, filling)) != hold.DONE:
        assert piece >= 0
        if piece in current:
            pages[piece].append((current[piece], int(filling.ends[piece])))
        current[piece] = np.full(PAGE_BYTES // 8 + 1, 2**64 - 1, dtype=np.uint64)
        filling.pages[piece], filling.ends[piece] = current[piece].ctypes.data, 0
    for piece, page in current.items():
        pages[piece].append((page, int(filling.ends[piece])))
    assert all(page[-1] == 2**64 - 1 for pages_of_piece in pages for page, _ in pages_of_piece)
    return pages


def runs_in(page: NDArray[np.uint64], n_bytes: int) -> Iterator[tuple[int, NDArray[Any], NDArray[Any]]]:
    """Yield the row, the columns and the values of each run of a page, by its definition."""
    content, at = page.view(np.uint8), 0
    while at < n_bytes:
        row, second = content[at : at + 8].view(np.uint32).tolist()
        n, code = divmod(second, 4)
        dtype = np.dtype([np.uint8, np.uint16, np.uint32, np.float32][code])
        values_at = -(-(at + 8 + 2 * n) // dtype.itemsize) * dtype.itemsize
        values = content[values_at : values_at + n * dtype.itemsize].view(dtype)
        yield row, content[at + 8 : at + 8 + 2 * n].view(np.uint16), values
        at = -(-(values_at + values.nbytes) // 8) * 8


def hold_entries() -> Arrays:
    found = []
    for all_columns in (False, True):
        what, written = wanted(all_columns=all_columns), filling()
        X = np.zeros((len(WANTED_ROWS), N_COLS), dtype=np.float32)
        for piece, pages in enumerate(pages_of(entries(), what, written)):
            for page in pages:
                for row, cols, values in runs_in(*page):
                    X[what.borders[piece] + row, cols] = values
        found += [X, written.counts]
    return tuple(found)


def held() -> Arrays:
    """Return what `hold_entries` must hold."""
    X, in_order = np.zeros((N_ROWS, N_COLS), np.float32), np.zeros((N_ROWS, N_COLS), np.float32)
    in_order[ROWS[BY_ROW], DIM_1] = COUNTS
    kept = COL_OF[DIM_1] >= 0
    X[ROWS[BY_ROW][kept], COL_OF[DIM_1][kept]] = COUNTS[kept]
    rows = (WANTED_IDS[WANTED_ROWS] - 2) // 5
    stored, stored_kept = (
        np.bincount(ROWS, minlength=N_ROWS),
        np.bincount(ROWS[BY_ROW][kept], minlength=N_ROWS),
    )
    return X[rows], stored_kept[rows], in_order[rows], stored[rows]


def place_runs() -> Arrays:
    what, written = wanted(all_columns=True), filling()
    pages = pages_of(entries(), what, written)
    indptr = np.concatenate([[0], np.cumsum(written.counts, dtype=np.int64)])
    indices, data = np.empty(indptr[-1], np.uint16), np.empty(indptr[-1], np.float32)
    for piece, (start, stop) in enumerate(pairwise(what.borders.tolist())):
        free, starts = indptr[start:stop].copy(), indptr[start : stop + 1]
        for page, n_bytes in pages[piece]:
            slots = starts, free, indices, data, as_bits(data)
            assert place.place_runs(page.ctypes.data, n_bytes, 2, N_COLS, *slots) != place.WRONG
        np.testing.assert_array_equal(free, starts[1:])
    X = np.zeros((len(WANTED_ROWS), N_COLS), dtype=np.float32)
    X[np.repeat(np.arange(len(X)), np.diff(indptr)), indices] = data
    return (X,)


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


DEFINITIONS: list[tuple[Callable[[], Arrays], Arrays]] = [
    (count_rows, (1 + np.bincount(ROWS, minlength=N_ROWS),)),
    (place_rows, (INDPTR[1:], INDICES, DATA[BY_ROW])),
    (hold_entries, held()),
    (place_runs, (held()[2],)),
    (fill_dense, (dense(),)),
    (sort_rows, (COLS[BY_ROW_AND_COL], DATA[BY_ROW_AND_COL])),
    (has_repeats, (np.array([False, True, False, True, False]),)),
]


def kernels() -> dict[str, Dispatcher]:
    found = vars(csr) | vars(hold) | vars(place)
    return {name: value for name, value in found.items() if isinstance(value, Dispatcher)}


def test_every_kernel_is_defined_here() -> None:
    names = {name for name in kernels() if not name.startswith("_")}
    assert names == {kernel.__name__ for kernel, _ in DEFINITIONS}


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
    values = np.ones(len(dim_0), dtype=np.float32)
    given = hold.Entries(dim_0=dim_0, keys=np.arange(len(dim_0)), values=values, bits=as_bits(values))
    firsts, order = np.arange(4, dtype=np.int32), np.arange(3, dtype=np.int32)
    ids, borders = np.array([3, 7, 9]), np.array([0, 3], dtype=np.int32)
    what = wanted(all_columns=True)._replace(joinids=ids, firsts=firsts, order=order, borders=borders)
    [[page]] = pages_of(given, what, filling(3, 1))
    assert [(row, cols.tolist()) for row, cols, _ in runs_in(*page)] == [
        (1, [0, 1]),
        (0, [2]),
        (2, [3, 4, 5]),
        (0, [7, 8]),
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"order": np.full(len(WANTED_ROWS), len(WANTED_ROWS), dtype=np.int32)},
        {"order": np.full(len(WANTED_ROWS), -1, dtype=np.int32)},
        {"order": np.zeros(3, dtype=np.int32)},
        {"firsts": np.arange(-1, len(WANTED_IDS), dtype=np.int32)},
        {"firsts": np.arange(3, dtype=np.int32)},
        {"borders": np.zeros(3, dtype=np.int32)},
        {"borders": np.full(N_PIECES + 1, len(WANTED_ROWS), dtype=np.int32)},
    ],
    ids=[
        "order_after",
        "order_before",
        "order_short",
        "firsts_before",
        "firsts_short",
        "borders_short",
        "borders_after",
    ],
)
def test_arrays_that_do_not_fit_together_are_told_and_nothing_is_written_outside(
    wrong: dict[str, Any],
) -> None:
    written = filling()
    pages = [np.zeros(PAGE_BYTES, dtype=np.uint8) for _ in range(N_PIECES)]
    written.pages[:], written.ends[:] = [page.ctypes.data for page in pages], 0
    what = wanted()._replace(**wrong)
    while (piece := hold.hold_entries(entries(), what, written)) >= 0:
        written.ends[piece] = 0
    assert piece == hold.OUT_OF_BOUNDS


def run(row: int, cols: list[int], values: list[int]) -> bytes:
    """Return a run with values of one byte."""
    content = np.array([row, 4 * len(cols)], np.uint32).tobytes() + np.array(cols, np.uint16).tobytes()
    content += bytes(values)
    return content + bytes(-len(content) % 8)


@pytest.mark.parametrize(
    "content",
    [
        run(2, [0], [1]),
        run(2**32 - 1, [0], [1]),
        run(0, [0, 1, 2], [1, 2, 3]),
        run(1, [4], [1]),
        run(1, [0], [1])[:-8],
        run(1, [0], [1]) + b"1234",
        np.array([0, 2**32 - 4], np.uint32).tobytes(),
    ],
    ids=["row_after", "row_far", "too_many", "column_after", "cut", "rest", "long"],
)
def test_pages_that_are_no_rows_are_told_and_nothing_is_written_outside(content: bytes) -> None:
    page = np.frombuffer(content + bytes(64), dtype=np.uint8)
    indices, data = np.full(9, 77, dtype=np.uint16), np.full(9, 77, dtype=np.float32)
    indptr, free = np.array([0, 2, 4]), np.array([0, 2])
    slots = indptr, free, indices[:4], data[:4], as_bits(data[:4])
    assert place.place_runs(page.ctypes.data, len(content), 2, 4, *slots) == place.WRONG
    assert (indices[4:] == 77).all()
    assert (data[4:] == 77).all()


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


def test_every_kernel_that_python_calls_is_kept_on_disk_with_those_that_it_calls_itself() -> None:
    for name, kernel in kernels().items():
        is_inner = kernel.targetoptions.get("no_cpython_wrapper", False)
        assert bool(kernel.stats.cache_path) is not is_inner, name
        assert is_inner is name.startswith("_"), name
