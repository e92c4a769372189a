from __future__ import annotations

import errno
import gc
import os
import resource
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tiledbsoma_ml._batch.read_ahead import read_ahead
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._kernels.bits import as_bits
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._soma.blocks import Extents, Pages
from tiledbsoma_ml._soma.window import Columns, Room, Window

LONG = 60  # seconds; only a failure waits as long

UNSIGNED = [np.dtype(t) for t in (np.uint8, np.uint16, np.uint32, np.uint64)]
SIGNED = [np.dtype(t) for t in (np.int8, np.int16, np.int32, np.int64)]
FLOATS = [np.dtype(t) for t in (np.float32, np.float64)]

Table = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]


# Rows that are wanted, of a layer that arrives in tables --------------------------------------------------


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

    def window(self, **options: Any) -> Window:
        return Window(self.obs_joinids, Columns(self.var_joinids), self.dtype, **options)

    def filled(self, **options: Any) -> Window:
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


def store_in(folder: Path | None) -> Pages | Extents:
    """Return where rows wait: in memory, or in a file whose extents hold a few of them."""
    return Pages() if folder is None else Extents(folder, 2**10)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("windows")


@settings(max_examples=250)
@given(layer=layers(), n_parts=st.integers(1, 12), in_files=st.booleans())
def test_the_parts_put_together_are_the_rows_in_the_order_asked_for_with_every_bit_of_every_value(
    folder: Path, layer: Layer, n_parts: int, in_files: bool
) -> None:
    window = layer.filled(n_parts=n_parts, store=store_in(folder if in_files else None))
    assert_same_bits(put_together(list(window)), layer.dense())


@settings(max_examples=100)
@given(layer=layers(), n_parts=st.integers(1, 12), data=st.data())
def test_dense_blocks_give_what_their_entries_that_are_not_zero_give(
    layer: Layer, n_parts: int, data: st.DataObject
) -> None:
    n_rows, n_cols = 33, 9
    values = np.random.default_rng(3).choice(
        np.array(data.draw(st.sampled_from(palettes(layer.dtype))), layer.dtype), (n_rows, n_cols)
    )
    rows, cols = layer.obs_joinids % n_rows, np.unique(layer.var_joinids % n_cols)[::-1]
    window, other = (Window(rows, Columns(cols), layer.dtype, n_parts=n_parts) for _ in range(2))
    borders = [0, data.draw(st.integers(1, n_rows - 1)), n_rows]
    for top, bottom in pairwise(borders):
        for left, right in ((0, 4), (4, n_cols)):
            block = values[top:bottom, left:right].copy()
            window.add_block(top, left, block)
            i, j = block.nonzero()
            other.add(i + top, j + left, block[i, j])
    assert_same_bits(put_together(list(window)), put_together(list(other)))


@given(
    seed=st.integers(0, 99), n_parts=st.integers(1, 40), in_files=st.booleans(), n_tables=st.integers(1, 9)
)
@settings(max_examples=30)
def test_rows_that_fill_many_pages_come_out_as_they_went_in(
    folder: Path, seed: int, n_parts: int, in_files: bool, n_tables: int
) -> None:
    layer = random_layer(seed, n_tables=n_tables)
    with mock.patch.multiple(Pages, SIZE=2**12, SLAB=2**14):
        window = layer.filled(n_parts=n_parts, store=store_in(folder if in_files else None))
        assert_same_bits(put_together(list(window)), layer.dense())


@settings(max_examples=100)
@given(layer=layers(), n_parts=st.integers(1, 5), in_files=st.booleans())
def test_narrow_parts_hold_every_bit_in_the_smallest_type_that_was_needed(
    folder: Path, layer: Layer, n_parts: int, in_files: bool
) -> None:
    window = layer.filled(n_parts=n_parts, store=store_in(folder if in_files else None))
    parts = list(window.give_out(narrow=True))
    assert_same_bits(np.concatenate([as_rows(part).astype(layer.dtype) for part in parts]), layer.dense())
    assert all(part.data.dtype in (np.uint8, np.uint16, np.uint32, layer.dtype) for part in parts)
    if all((values >= 0).all() and (values <= 255).all() for *_, values in layer.tables):
        whole = all(
            (values == np.floor(values)).all() and not np.signbit(values).any() for *_, values in layer.tables
        )
        assert not whole or all(part.data.dtype.itemsize == 1 for part in parts if part.nnz)


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("dtype", UNSIGNED + SIGNED + FLOATS, ids=str)
def test_every_palette_of_values_survives_whatever_is_in_the_table_beside_it(
    folder: Path, dtype: np.dtype[Any], in_files: bool
) -> None:
    tables = [
        (np.full(len(values), row), np.arange(len(values)), np.array(values, dtype=dtype))
        for row, values in enumerate(palettes(dtype))
    ]
    n_rows = len(tables)
    layer = Layer(tables, dtype, np.arange(n_rows)[::-1], np.arange(4))
    window = layer.filled(n_parts=3, store=store_in(folder if in_files else None))
    assert_same_bits(put_together(list(window)), layer.dense())


def test_more_columns_than_two_bytes_can_number_are_kept_apart() -> None:
    cols = np.array([0, 65_535, 65_536, 69_999])
    tables = [(np.zeros(4, np.int64), cols, np.array([1, 2, 3, 4], dtype=np.float32))]
    layer = Layer(tables, np.dtype(np.float32), np.array([0, 0]), np.arange(70_000)[::-1])
    for part in layer.filled(n_parts=2):
        assert part.indices.dtype == np.uint32
        assert dict(zip(part.indices.tolist(), part.data.tolist(), strict=True)) == {
            69_999: 1.0,
            4464: 2.0,
            4463: 3.0,
            0: 4.0,
        }


@pytest.mark.parametrize(("n_rows", "n_parts"), [(1, 1), (1, 5), (10, 1), (10, 3), (10, 10), (10, 99)])
def test_parts_are_of_almost_equal_size_and_none_is_empty(n_rows: int, n_parts: int) -> None:
    layer = Layer([], np.dtype(np.uint8), np.arange(n_rows), np.arange(3))
    sizes = [len(part) for part in layer.filled(n_parts=n_parts)]
    assert len(sizes) == min(n_rows, n_parts)
    assert sum(sizes) == n_rows
    assert max(sizes) - min(sizes) <= 1


def test_no_rows_are_one_part_without_rows() -> None:
    layer = Layer([], np.dtype(np.uint8), np.arange(0), np.arange(3))
    assert [part.shape for part in layer.filled(n_parts=4)] == [(0, 3)]


def test_no_columns_leave_rows_without_entries() -> None:
    layer = Layer([(np.arange(2), np.arange(2), np.ones(2))], np.dtype(float), np.arange(2), np.arange(0))
    assert [(part.shape, part.nnz) for part in layer.filled()] == [((2, 0), 0)]


@pytest.mark.parametrize(
    ("limit", "dtype", "value_bytes"),
    [
        (255, np.float32, 1),
        (256, np.float32, 2),
        (65_535, np.float32, 2),
        (65_536, np.float32, 4),
        (255, np.float64, 1),
        (65_536, np.float64, 4),
        (2**32 - 1, np.float64, 4),
        (2**32, np.float64, 8),
        (0.5, np.float32, 4),
        (255, np.int64, 1),
        (-1, np.int64, 8),
        (2**32 - 1, np.uint64, 4),
        (255, np.uint8, 1),
    ],
)
def test_an_entry_takes_two_bytes_for_its_column_and_as_few_for_its_value_as_hold_it_exactly(
    limit: float, dtype: Any, value_bytes: int
) -> None:
    values = np.array([1, 2, limit], dtype=dtype)
    layer = Layer([(np.zeros(3, int), np.arange(3), values)], values.dtype, np.arange(1), np.arange(3))
    window = layer.filled()
    assert window.nbytes == 8 + 3 * (2 + value_bytes)  # the run's row and length, then its entries


# Room -----------------------------------------------------------------------------------------------------


class WatchedRoom(Room):
    """A room that tells who had to wait, and checks at every step that its limit holds."""

    def __init__(self, n_bytes: float) -> None:
        super().__init__(n_bytes)
        self.had_to_wait: list[Window] = []
        self.has_to_wait = threading.Event()

    def take(self, window: Window, n_bytes: int) -> None:
        super().take(window, n_bytes)
        with self._changed:
            assert sum(self._held.values()) <= self._n_bytes or set(self._held) == {window}

    def _has_room(self, window: Window, n_bytes: int) -> bool:
        answer = super()._has_room(window, n_bytes)
        if not answer:
            self.had_to_wait.append(window)
            self.has_to_wait.set()
        return answer


ROW_BYTES = 8 + 4 * 3  # a run's row and length, then columns and counts


def rows_of_counts(n_rows: int, first: int = 0) -> Layer:
    """Return a layer whose rows have four entries each, in one table."""
    i, j = np.divmod(np.arange(4 * n_rows), 4)
    order = np.random.default_rng(first).permutation(n_rows)
    counts = (i + j + first) % 250
    return Layer(
        [(i + first, j, counts.astype(np.float32))], np.dtype(np.float32), order + first, np.arange(4)
    )


def test_a_second_window_waits_while_the_first_holds_too_much_and_goes_on_as_that_is_given_out() -> None:
    room = WatchedRoom(12 * ROW_BYTES)
    first, other = rows_of_counts(10), rows_of_counts(5, first=100)
    holding = first.filled(n_parts=5, room=room)
    assert not room.has_to_wait.is_set()
    parts = iter(holding)

    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(other.filled, room=room)  # 15 rows are too many, and so are 13
        assert room.has_to_wait.wait(LONG)
        given_out = [next(parts)]
        assert not filling.done()
        given_out.append(next(parts))  # 11 rows
        window = filling.result(LONG)

    assert set(room.had_to_wait) == {window}
    assert_same_bits(put_together([*given_out, *parts]), first.dense())
    assert_same_bits(put_together(list(window)), other.dense())


def test_two_windows_that_fit_into_the_room_together_wait_for_nothing() -> None:
    room = WatchedRoom(15 * ROW_BYTES)
    windows = [rows_of_counts(10).filled(room=room), rows_of_counts(5).filled(room=room)]
    assert room.had_to_wait == []
    assert sum(window.nbytes for window in windows) == 15 * ROW_BYTES


@pytest.mark.parametrize("n_bytes", [-5, 0, 1, 3 * ROW_BYTES])
def test_a_window_that_is_alone_may_be_larger_than_the_room(n_bytes: int) -> None:
    room = WatchedRoom(n_bytes)
    for first in (0, 100):  # one after the other: the room is free again once the first is given out
        layer = rows_of_counts(20, first)
        assert_same_bits(put_together(list(layer.filled(n_parts=4, room=room))), layer.dense())
    assert room.had_to_wait == []


def test_closing_the_room_ends_a_waiting_thread_with_an_error() -> None:
    room = WatchedRoom(ROW_BYTES)
    rows_of_counts(10).filled(room=room)
    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(rows_of_counts(5).filled, room=room)
        assert room.has_to_wait.wait(LONG)
        assert not filling.done()
        room.close()
        with pytest.raises(RuntimeError, match="the iterator was closed while rows were read ahead"):
            filling.result(LONG)


def test_a_closed_room_lets_nobody_in_but_rows_that_are_there_can_be_given_out() -> None:
    room, layer = Room(10**6), rows_of_counts(5)
    window = layer.filled(n_parts=2, room=room)
    room.close()
    with pytest.raises(RuntimeError, match="the iterator was closed"):
        rows_of_counts(1).filled(room=room)
    assert_same_bits(put_together(list(window)), layer.dense())


class WindowReader:
    """Rows of `rows_of_counts`, read into windows that share pages and a room."""

    def __init__(self, **options: Any) -> None:
        self._options = {"store": Pages(), **options}

    def close(self) -> None:
        self._options["room"].close()

    def read(self, obs_joinids: NDArray[np.int64]) -> Iterator[Rows[CSR_IO_Buffer]]:
        window = Window(obs_joinids, Columns(np.arange(4)), np.dtype(np.float32), **self._options)
        for rows in np.array_split(np.sort(obs_joinids), 3):
            window.add(*self.table(rows))
        return (
            Rows(obs_joinids=np.arange(len(X)), X=X, obs=pd.DataFrame(index=range(len(X)))) for X in window
        )

    @staticmethod
    def table(rows: NDArray[np.int64]) -> Table:
        i, j = np.repeat(rows, 4), np.tile(np.arange(4), len(rows))
        return i, j, ((i + j) % 1000).astype(np.float32)


@given(
    sizes=st.lists(st.integers(1, 60), max_size=6),
    limit=st.integers(0, 80 * ROW_BYTES),
    n_parts=st.integers(1, 8),
    in_files=st.booleans(),
)
@example(sizes=[60, 60, 60], limit=0, n_parts=1, in_files=False)
@example(sizes=[60, 1, 60], limit=60 * ROW_BYTES, n_parts=8, in_files=True)
def test_windows_that_are_filled_while_those_before_are_given_out_never_block_each_other(
    folder: Path, sizes: list[int], limit: int, n_parts: int, in_files: bool
) -> None:
    rng = np.random.default_rng(sum(sizes))
    batches = np.split(rng.permutation(sum(sizes)), np.cumsum(sizes)[:-1]) if sizes else []
    room = WatchedRoom(limit)
    reader = WindowReader(n_parts=n_parts, room=room, store=store_in(folder if in_files else None))
    with mock.patch.multiple(Pages, SIZE=2**12, SLAB=2**13):
        read = read_ahead(iter(batches), reader, use_eager_fetch=True)
        found = [rows.X.slice_tonumpy(slice(None)) for rows, _ in read]
    rows = np.concatenate([*batches, np.empty(0, dtype=np.int64)])
    expected = WindowReader.table(rows)[2].reshape(-1, 4)
    np.testing.assert_array_equal(np.concatenate([*found, np.empty((0, 4), np.float32)]), expected)


# Pages ----------------------------------------------------------------------------------------------------


class CountedPages(Pages):
    """Pages that tell how often each was taken, and how many are out."""

    def __init__(self) -> None:
        super().__init__()
        self.times_taken: Counter[int] = Counter()
        self.out: dict[int, NDArray[np.uint8]] = {}

    def take(self) -> NDArray[np.uint8]:
        page = super().take()
        assert page.ctypes.data not in self.out
        self.out[page.ctypes.data] = page
        self.times_taken[page.ctypes.data] += 1
        return page

    def give_back(self, page: NDArray[np.uint8]) -> None:
        del self.out[page.ctypes.data]
        super().give_back(page)


def test_a_page_that_was_given_back_is_used_again() -> None:
    pages = Pages()
    page, other = pages.take(), pages.take()
    pages.give_back(page)
    assert pages.take() is page
    pages.give_back(other)
    pages.give_back(page)
    assert {id(pages.take()), id(pages.take())} == {id(page), id(other)}


def test_pages_that_are_out_at_once_have_no_byte_in_common() -> None:
    pages = Pages()
    n_pages = 2 * Pages.SLAB // Pages.SIZE + 1
    starts = sorted(page.ctypes.data for page in [pages.take() for _ in range(n_pages)])
    assert (np.diff(starts) >= Pages.SIZE).all()
    assert {len(pages.take()) for _ in range(3)} == {Pages.SIZE}


def test_a_page_is_never_handed_to_two_threads_at_once() -> None:
    pages = Pages()

    def use(number: int) -> None:
        for _ in range(300):
            mine = [pages.take() for _ in range(3)]
            for page in mine:
                page[:64] = number
            for page in mine:
                assert (page[:64] == number).all()
                pages.give_back(page)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(use, range(4)))
    finally:
        sys.setswitchinterval(interval)


def test_a_window_gives_its_pages_back_part_by_part_and_the_next_one_uses_them() -> None:
    with mock.patch.multiple(Pages, SIZE=2**12, SLAB=2**14):
        pages = CountedPages()
        parts = iter(random_layer(0).filled(n_parts=6, store=pages))
        n_out = [len(pages.out)] + [len(pages.out) for _ in parts]
        assert n_out == sorted(n_out, reverse=True)
        assert len(set(n_out)) == len(n_out)
        assert n_out[-1] == 0
        n_pages = len(pages.times_taken)
        for seed in (0, 0):
            assert list(random_layer(seed).filled(n_parts=6, store=pages))
        slab = Pages.SLAB // Pages.SIZE
    assert len(pages.times_taken) <= -(-n_pages // slab) * slab
    assert max(pages.times_taken.values()) > 1


def test_a_window_that_is_filled_while_another_is_given_out_leaves_its_rows_alone() -> None:
    first, other = random_layer(1), random_layer(2)
    with mock.patch.multiple(Pages, SIZE=2**12, SLAB=2**14):
        pages = CountedPages()
        parts, later = iter(first.filled(n_parts=5, store=pages)), other.window(n_parts=5, store=pages)
        given_out = []
        for table in other.tables:
            given_out.append(next(parts))
            later.add(*table)
        assert_same_bits(put_together(given_out), first.dense())
        assert_same_bits(put_together(list(later)), other.dense())


# Files ----------------------------------------------------------------------------------------------------

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are listed on Linux")


def open_files(folder: Path) -> list[int]:
    """Return the sizes of the open files that were made in a folder, whether they have a name or not."""
    sizes = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            if str(link.readlink()).startswith(f"{folder}/"):
                sizes.append(link.stat().st_size)
        except FileNotFoundError:  # the listing itself
            continue
    return sizes


def test_no_file_has_a_name_at_any_moment(tmp_path: Path) -> None:
    seen = []

    def spied(method: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*args: Any) -> Any:
            seen.append(list(tmp_path.iterdir()))
            result = method(*args)
            seen.append(list(tmp_path.iterdir()))
            return result

        return spy

    layer = random_layer(3)
    with mock.patch.multiple(
        Extents, __init__=spied(Extents.__init__), write=spied(Extents.write), read=spied(Extents.read)
    ):
        for part in layer.filled(n_parts=4, store=store_in(tmp_path)):
            assert len(part)
            seen.append(list(tmp_path.iterdir()))
    assert len(seen) > 20
    assert not any(seen)


@needs_proc
def test_windows_of_many_parts_need_one_file_however_few_may_be_open(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    layers = [random_layer(seed) for seed in range(3)]
    store = Extents(tmp_path, 2**12)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 8, hard))
    try:
        windows = [layer.filled(n_parts=200, store=store) for layer in layers]
        assert len(open_files(tmp_path)) == 1
        for layer, window in zip(layers, windows, strict=True):
            assert_same_bits(put_together(list(window)), layer.dense())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@needs_proc
def test_the_space_of_a_part_is_used_again_once_it_was_taken(tmp_path: Path) -> None:
    n_parts, layers = 5, [random_layer(seed) for seed in range(4)]
    store = Extents(tmp_path, 2**12)
    windows = [layer.filled(n_parts=n_parts, store=store) for layer in layers[:2]]
    [at_first] = open_files(tmp_path)
    n_bytes = sum(window.nbytes for window in windows)
    assert n_bytes - 2 * n_parts * 2**11 < at_first < n_bytes + 2 * n_parts * 2**12
    for number, layer in enumerate(layers):
        assert_same_bits(put_together(list(windows[number])), layer.dense())
        if number + 2 < len(layers):
            windows.append(layers[number + 2].filled(n_parts=n_parts, store=store))
    [at_last] = open_files(tmp_path)
    assert at_last < at_first + n_bytes / 10  # windows differ a little


def test_a_disk_that_becomes_full_is_told_with_its_folder(tmp_path: Path) -> None:
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    rule = f"window_dir='{tmp_path}' must take .*, but: No space left on device; choose another folder, or"
    with mock.patch.object(os, "pwrite", full), pytest.raises(OSError, match=rule) as raised:
        random_layer(5).filled(n_parts=3, store=store_in(tmp_path))
    assert raised.value.errno == errno.ENOSPC


def test_an_operating_system_that_writes_and_reads_less_than_asked_for_is_asked_again(tmp_path: Path) -> None:
    pwrite, preadv, layer = os.pwrite, os.preadv, random_layer(5)
    with (
        mock.patch.object(os, "pwrite", lambda file, data, start: pwrite(file, data[:999], start)),
        mock.patch.object(os, "preadv", lambda file, into, start: preadv(file, [into[0][:777]], start)),
    ):
        window = layer.filled(n_parts=3, store=store_in(tmp_path))
        assert_same_bits(put_together(list(window)), layer.dense())


@needs_proc
@pytest.mark.parametrize("n_taken", [0, 2])
def test_files_of_a_window_that_is_not_used_up_are_closed_with_it(tmp_path: Path, n_taken: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the next test is about those
        leave_early(random_layer(6).filled(n_parts=5, store=store_in(tmp_path)), n_taken)
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("n_taken", [0, 2])
def test_nothing_complains_about_a_window_that_is_not_used_up(tmp_path: Path, n_taken: int) -> None:
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always", ResourceWarning)
        leave_early(random_layer(6).filled(n_parts=5, store=store_in(tmp_path)), n_taken)
    assert [str(warning.message) for warning in complaints] == []


def leave_early(window: Window, n_taken: int) -> None:
    parts = iter(window)
    for _ in range(n_taken):
        next(parts)
    del parts, window
    gc.collect()


def test_a_folder_that_is_gone_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        rows_of_counts(3).filled(store=store_in(tmp_path / "gone"))
