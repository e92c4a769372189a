from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from layer_tables import (
    FLOATS,
    SIGNED,
    SMALL_PAGES,
    UNSIGNED,
    Layer,
    Table,
    as_rows,
    assert_same_bits,
    layers,
    palettes,
    put_together,
    random_layer,
    rows_of_counts,
    store_in,
)
from tiledbsoma_ml._batch.read_ahead import read_ahead
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._soma.held_rows import ByteLimit, Columns, HeldRows
from tiledbsoma_ml._soma.stores import Pages

LONG = 60  # seconds; only a failure waits as long


# Rows that are wanted, of a layer that arrives in tables --------------------------------------------------


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("windows")


@settings(max_examples=250)
@given(layer=layers(), n_pieces=st.integers(1, 12), in_files=st.booleans())
def test_the_pieces_put_together_are_the_rows_in_the_order_asked_for_with_every_bit_of_every_value(
    folder: Path, layer: Layer, n_pieces: int, in_files: bool
) -> None:
    held = layer.filled(n_pieces=n_pieces, store=store_in(folder if in_files else None))
    assert_same_bits(put_together(list(held)), layer.dense())


@settings(max_examples=40)
@given(layer=layers(), n_pieces=st.integers(1, 12), data=st.data())
def test_dense_blocks_give_what_their_entries_that_are_not_zero_give(
    layer: Layer, n_pieces: int, data: st.DataObject
) -> None:
    n_rows, n_cols = 33, 9
    values = np.random.default_rng(3).choice(
        np.array(data.draw(st.sampled_from(palettes(layer.dtype))), layer.dtype), (n_rows, n_cols)
    )
    rows, cols = layer.obs_joinids % n_rows, np.unique(layer.var_joinids % n_cols)[::-1]
    held, other = (HeldRows(rows, Columns(cols), layer.dtype, n_pieces=n_pieces) for _ in range(2))
    borders = [0, data.draw(st.integers(1, n_rows - 1)), n_rows]
    for top, bottom in pairwise(borders):
        for left, right in ((0, 4), (4, n_cols)):
            block = values[top:bottom, left:right].copy()
            held.add_block(top, left, block)
            i, j = block.nonzero()
            other.add(i + top, j + left, block[i, j])
    assert_same_bits(put_together(list(held)), put_together(list(other)))


@given(
    seed=st.integers(0, 99), n_pieces=st.integers(1, 40), in_files=st.booleans(), n_tables=st.integers(1, 9)
)
@settings(max_examples=30)
def test_rows_that_fill_many_pages_come_out_as_they_went_in(
    folder: Path, seed: int, n_pieces: int, in_files: bool, n_tables: int
) -> None:
    layer = random_layer(seed, n_tables=n_tables)
    held = layer.filled(n_pieces=n_pieces, store=store_in(folder if in_files else None, **SMALL_PAGES))
    assert_same_bits(put_together(list(held)), layer.dense())


@settings(max_examples=100)
@given(layer=layers(), n_pieces=st.integers(1, 5), in_files=st.booleans())
def test_narrow_pieces_hold_every_bit_in_the_smallest_type_that_was_needed(
    folder: Path, layer: Layer, n_pieces: int, in_files: bool
) -> None:
    held = layer.filled(n_pieces=n_pieces, store=store_in(folder if in_files else None))
    parts = list(held.give_out(narrow=True))
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
    held = layer.filled(n_pieces=3, store=store_in(folder if in_files else None))
    assert_same_bits(put_together(list(held)), layer.dense())


def ascends(part: CSR_IO_Buffer) -> bool:
    rows = np.repeat(np.arange(len(part)), np.diff(part.indptr))
    return bool((np.diff(rows * 2**32 + part.indices) > 0).all())


@settings(max_examples=100)
@given(layer=layers(), n_pieces=st.integers(1, 5))
def test_pieces_whose_columns_are_said_to_ascend_have_columns_that_ascend(
    layer: Layer, n_pieces: int
) -> None:
    assert all(ascends(part) for part in layer.filled(n_pieces=n_pieces) if part.is_canonical)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([1, 3], [4, 6], True), ([4, 6], [1, 3], False), ([1, 3], [3, 4], False), ([3, 1], [4, 6], False)],
    ids=["ascending", "tables_descend", "repeated", "a_run_descends"],
)
@pytest.mark.parametrize("n_vars", [8, 70_000])
def test_columns_ascend_if_they_do_in_each_table_and_from_table_to_table(
    first: list[int], second: list[int], expected: bool, n_vars: int
) -> None:
    tables = [
        (np.zeros(len(cols), np.int64), np.array(cols), np.ones(len(cols), dtype=np.float32))
        for cols in (first, second)
    ]
    [part] = Layer(tables, np.dtype(np.float32), np.zeros(1, np.int64), np.arange(n_vars)).filled()
    assert part.is_canonical is expected
    assert sorted(part.indices.tolist()) == sorted(first + second)


@pytest.mark.parametrize(("narrow", "index_type"), [(True, np.uint32), (False, np.int32)])
def test_more_columns_than_two_bytes_can_number_are_kept_apart(narrow: bool, index_type: Any) -> None:
    cols = np.array([0, 65_535, 65_536, 69_999])
    tables = [(np.zeros(4, np.int64), cols, np.array([1, 2, 3, 4], dtype=np.float32))]
    layer = Layer(tables, np.dtype(np.float32), np.array([0, 0]), np.arange(70_000)[::-1])
    for part in layer.filled(n_pieces=2).give_out(narrow=narrow):
        assert part.indices.dtype == index_type
        assert dict(zip(part.indices.tolist(), part.data.tolist(), strict=True)) == {
            69_999: 1.0,
            4464: 2.0,
            4463: 3.0,
            0: 4.0,
        }


@pytest.mark.parametrize(("n_rows", "n_pieces"), [(1, 1), (1, 5), (10, 1), (10, 3), (10, 10), (10, 99)])
def test_pieces_are_of_almost_equal_size_and_none_is_empty(n_rows: int, n_pieces: int) -> None:
    layer = Layer([], np.dtype(np.uint8), np.arange(n_rows), np.arange(3))
    sizes = [len(part) for part in layer.filled(n_pieces=n_pieces)]
    assert len(sizes) == min(n_rows, n_pieces)
    assert sum(sizes) == n_rows
    assert max(sizes) - min(sizes) <= 1


def test_no_rows_are_one_piece_without_rows() -> None:
    layer = Layer([], np.dtype(np.uint8), np.arange(0), np.arange(3))
    assert [part.shape for part in layer.filled(n_pieces=4)] == [(0, 3)]


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
    values = np.array([1, 2, 3, 4, 5, 6, 7, limit], dtype=dtype)
    layer = Layer([(np.zeros(8, int), np.arange(8), values)], values.dtype, np.arange(1), np.arange(8))
    assert layer.filled().nbytes == 8 + 8 * (2 + value_bytes)  # the run's row and length, then its entries


def test_one_large_value_makes_the_run_of_its_row_larger_and_no_other() -> None:
    values = np.array([7] * 15 + [70_000], dtype=np.float32)
    layer = Layer(
        [(np.repeat([0, 1], 8), np.tile(np.arange(8), 2), values)], values.dtype, np.arange(2), np.arange(8)
    )
    assert layer.filled().nbytes == 8 + 8 * (2 + 1) + 8 + 8 * (2 + 4)


# Limits ---------------------------------------------------------------------------------------------------


class WatchedLimit(ByteLimit):
    """A limit that records who had to wait, and checks at every step that it holds."""

    def __init__(self, n_bytes: float) -> None:
        super().__init__(n_bytes)
        self.had_to_wait: list[HeldRows] = []
        self.has_to_wait = threading.Event()

    def take(self, held: HeldRows, n_bytes: int, *, may_exceed: bool = True) -> bool:
        is_taken = super().take(held, n_bytes, may_exceed=may_exceed)
        with self._changed:
            assert sum(self._held.values()) <= self._n_bytes or set(self._held) == {held}
        return is_taken

    def _is_allowed(self, held: HeldRows, n_bytes: int) -> bool:
        answer = super()._is_allowed(held, n_bytes)
        if not answer:
            self.had_to_wait.append(held)
            self.has_to_wait.set()
        return answer


PAGE_BYTES = 64
"""Size of pages of which each has two rows of `rows_of_counts`, with 24 bytes each."""


def small_pages() -> Pages:
    return Pages(page_bytes=PAGE_BYTES, slab_bytes=4 * PAGE_BYTES)


def test_a_second_read_waits_while_the_first_holds_too_much_and_goes_on_as_that_is_given_out() -> None:
    byte_limit = WatchedLimit(6 * PAGE_BYTES)
    first, other = rows_of_counts(10), rows_of_counts(5, first=100)
    holding = first.filled(n_pieces=5, byte_limit=byte_limit, store=small_pages())
    assert not byte_limit.has_to_wait.is_set()
    parts = iter(holding)

    with ThreadPoolExecutor(1) as pool:
        # The pages of 10 and 5 rows are 5 and 3, which are too many, and so are 4 and 3.
        filling = pool.submit(other.filled, byte_limit=byte_limit, store=small_pages())
        assert byte_limit.has_to_wait.wait(LONG)
        given_out = [next(parts)]
        assert not filling.done()
        given_out.append(next(parts))
        held = filling.result(LONG)

    assert set(byte_limit.had_to_wait) == {held}
    assert_same_bits(put_together([*given_out, *parts]), first.dense())
    assert_same_bits(put_together(list(held)), other.dense())


def test_two_reads_that_fit_into_the_limit_together_wait_for_nothing() -> None:
    byte_limit = WatchedLimit(8 * PAGE_BYTES)
    windows = [
        rows_of_counts(10).filled(byte_limit=byte_limit, store=small_pages()),
        rows_of_counts(5).filled(byte_limit=byte_limit, store=small_pages()),
    ]
    assert byte_limit.had_to_wait == []
    assert sum(held.nbytes for held in windows) == 15 * 24


@pytest.mark.parametrize("n_bytes", [-5, 0, 1, 3 * PAGE_BYTES])
def test_a_read_that_is_alone_may_be_larger_than_the_limit(n_bytes: int) -> None:
    byte_limit = WatchedLimit(n_bytes)
    for first in (0, 100):  # one after the other: the limit is free again once the first is given out
        layer = rows_of_counts(20, first)
        held = layer.filled(n_pieces=4, byte_limit=byte_limit, store=small_pages())
        assert_same_bits(put_together(list(held)), layer.dense())
    assert byte_limit.had_to_wait == []


@settings(max_examples=150)
@given(layer=layers(), n_pieces=st.integers(1, 12), n_bytes=st.integers(0, 2000), in_files=st.booleans())
def test_rows_that_the_limit_does_not_hold_are_dropped_from_the_end_and_the_others_are_whole(
    folder: Path, layer: Layer, n_pieces: int, n_bytes: int, in_files: bool
) -> None:
    byte_limit = ByteLimit(n_bytes)
    store = store_in(folder if in_files else None)
    held = layer.filled(n_pieces=n_pieces, store=store, byte_limit=byte_limit, may_drop=True)
    n_rows = len(layer.dense())
    first = np.linspace(0, n_rows, min(n_pieces, max(n_rows, 1)) + 1).astype(int)[1]
    assert first <= held.n_rows <= n_rows
    if held.n_rows > first:
        assert byte_limit.n_held() <= n_bytes
    assert_same_bits(put_together(list(held)), layer.dense()[: held.n_rows])
    assert byte_limit.n_held() == 0


def test_closing_the_limit_ends_a_waiting_thread_with_an_error() -> None:
    byte_limit = WatchedLimit(PAGE_BYTES)
    rows_of_counts(10).filled(byte_limit=byte_limit, store=small_pages())
    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(rows_of_counts(5).filled, byte_limit=byte_limit)
        assert byte_limit.has_to_wait.wait(LONG)
        assert not filling.done()
        byte_limit.close()
        with pytest.raises(RuntimeError, match="the iterator was closed while rows were read ahead"):
            filling.result(LONG)


def test_a_closed_limit_lets_nobody_in_but_rows_that_are_held_can_be_given_out() -> None:
    byte_limit, layer = ByteLimit(10**6), rows_of_counts(5)
    held = layer.filled(n_pieces=2, byte_limit=byte_limit)
    byte_limit.close()
    with pytest.raises(RuntimeError, match="the iterator was closed"):
        rows_of_counts(1).filled(byte_limit=byte_limit)
    assert_same_bits(put_together(list(held)), layer.dense())


class HoldingReader:
    """Rows of `rows_of_counts`, held in pages of one store, within one limit."""

    def __init__(self, **options: Any) -> None:
        self._options = options

    def close(self) -> None:
        self._options["byte_limit"].close()

    def read(self, obs_joinids: NDArray[np.int64]) -> Iterator[Rows[CSR_IO_Buffer]]:
        held = HeldRows(obs_joinids, Columns(np.arange(4)), np.dtype(np.float32), **self._options)
        for rows in np.array_split(np.sort(obs_joinids), 3):
            held.add(*self.table(rows))
        return (Rows(obs_joinids=np.arange(len(X)), X=X, obs=pd.DataFrame(index=range(len(X)))) for X in held)

    @staticmethod
    def table(rows: NDArray[np.int64]) -> Table:
        i, j = np.repeat(rows, 4), np.tile(np.arange(4), len(rows))
        return i, j, ((i + j) % 1000).astype(np.float32)


@given(
    sizes=st.lists(st.integers(1, 60), max_size=6),
    limit=st.integers(0, 40 * PAGE_BYTES),
    n_pieces=st.integers(1, 8),
    in_files=st.booleans(),
)
@example(sizes=[60, 60, 60], limit=0, n_pieces=1, in_files=False)
@example(sizes=[60, 1, 60], limit=30 * PAGE_BYTES, n_pieces=8, in_files=True)
def test_reads_that_are_held_while_those_before_are_given_out_never_block_each_other(
    folder: Path, sizes: list[int], limit: int, n_pieces: int, in_files: bool
) -> None:
    rng = np.random.default_rng(sum(sizes))
    batches = np.split(rng.permutation(sum(sizes)), np.cumsum(sizes)[:-1]) if sizes else []
    byte_limit = WatchedLimit(limit)
    store = store_in(folder) if in_files else small_pages()
    reader = HoldingReader(n_pieces=n_pieces, byte_limit=byte_limit, store=store)
    read = read_ahead(iter(batches), reader, use_eager_fetch=True)
    found = [rows.X.slice_tonumpy(slice(None)) for rows, _ in read]
    rows = np.concatenate([*batches, np.empty(0, dtype=np.int64)])
    expected = HoldingReader.table(rows)[2].reshape(-1, 4)
    np.testing.assert_array_equal(np.concatenate([*found, np.empty((0, 4), np.float32)]), expected)
