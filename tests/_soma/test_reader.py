from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledbsoma as soma
from hypothesis import given
from hypothesis import strategies as st
from torch._utils import ExceptionWrapper

from stores import DTYPES, N_OBS, N_VARS, Store, expected_X, make_experiment, make_obs
from tiledbsoma_ml import XLocator
from tiledbsoma_ml._soma import reader as _reader
from tiledbsoma_ml._soma.reader import SOMAReader
from tiledbsoma_ml._soma.stores import Extents


def read(
    store: Store,
    obs_joinids: Sequence[int],
    /,
    var_joinids: Sequence[int] = range(N_VARS),
    columns: Sequence[str] = ("soma_joinid",),
    among: Sequence[int] | None = None,
    **options: Any,
) -> tuple[np.ndarray, pd.DataFrame]:
    """Return dense X and obs as a reader gives them that was told of the rows `among`."""
    rows = np.asarray(obs_joinids, dtype=np.int64)
    with store.locator.open() as (X, obs):
        reader = SOMAReader(
            X,
            obs,
            np.asarray(var_joinids, dtype=np.int64),
            obs_column_names=columns,
            obs_joinids=rows if among is None else np.asarray(among, dtype=np.int64),
            **options,
        )
        parts = reader.read(rows)
    matrices, frames = zip(*((part.X, part.obs) for part in parts), strict=True)  # though it is closed by now
    assert all(frame.index.equals(pd.RangeIndex(len(frame))) for frame in frames)
    X = np.concatenate([csr.slice_tonumpy(slice(None)) for csr in matrices])
    return X, pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]


def row_coords(store: Store, obs_joinids: Sequence[int]) -> Any:
    with store.locator.open() as (X, _):
        return _reader._rows_to_read(X, np.asarray(obs_joinids, dtype=np.int64))


def column_coords(store: Store, var_joinids: Sequence[int]) -> Any:
    with store.locator.open() as (X, _):
        return _reader._columns_to_read(X, np.asarray(var_joinids, dtype=np.int64))


@pytest.fixture(scope="session")
def dense_store(make_store: Any) -> Store:
    return make_store(dense=True, dtype=np.int32)


@given(
    obs_joinids=st.lists(st.integers(0, N_OBS - 1), max_size=60),
    var_joinids=st.lists(st.integers(0, N_VARS - 1), unique=True, max_size=N_VARS),
    dense=st.booleans(),
    n_pieces=st.integers(1, 9),
    eager=st.booleans(),
    n_streams=st.integers(1, 5),
    in_files=st.booleans(),
)
def test_rows_and_columns_come_in_the_order_asked_for_repeats_included(
    store: Store,
    dense_store: Store,
    tmp_path_factory: pytest.TempPathFactory,
    obs_joinids: list[int],
    var_joinids: list[int],
    dense: bool,
    n_pieces: int,
    eager: bool,
    n_streams: int,
    in_files: bool,
) -> None:
    folder = tmp_path_factory.getbasetemp() if in_files else None
    options = {
        "n_pieces": n_pieces,
        "use_eager_fetch": eager,
        "n_streams": n_streams,
        "store": Extents(folder, 2**12) if folder else None,
    }
    X, obs = read(dense_store if dense else store, obs_joinids, var_joinids, **options)
    np.testing.assert_array_equal(X, expected_X(obs_joinids, var_joinids))
    assert obs["soma_joinid"].tolist() == obs_joinids


@given(
    obs_joinids=st.lists(st.integers(0, N_OBS - 1), min_size=1, max_size=60, unique=True).map(sorted),
    n_streams=st.integers(1, 9),
)
def test_streams_share_the_rows_of_a_read_but_no_tile(
    store: Store, obs_joinids: list[int], n_streams: int
) -> None:
    asked = []
    read_sparse = soma.SparseNDArray.read

    def spy(self: soma.SparseNDArray, coords: Any) -> Any:
        rows = coords[0]
        asked.append(range(rows.start, rows.stop + 1) if isinstance(rows, slice) else rows)
        return read_sparse(self, coords)

    with mock.patch.object(soma.SparseNDArray, "read", spy):
        X, _ = read(store, obs_joinids, use_eager_fetch=True, n_streams=n_streams)
    np.testing.assert_array_equal(X, expected_X(obs_joinids, range(N_VARS)))
    with store.locator.open() as (array, _):
        tiles = [set((np.asarray(rows) // _reader.row_tile(array)).tolist()) for rows in asked]
    n_tiles = len(set().union(*tiles))
    assert sum(map(len, tiles)) == n_tiles
    assert len(asked) <= min(n_streams, n_tiles)
    assert max(map(len, tiles)) <= n_tiles - len(asked) + 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense", [False, True])
def test_a_layer_keeps_its_dtype_and_every_value(make_store: Any, dtype: Any, dense: bool) -> None:
    n_obs = 12 if np.dtype(dtype).itemsize == 1 else 30
    typed = make_store(dtype=dtype, dense=dense, obs_joinids=range(n_obs), n_vars=9)
    X, _ = read(typed, range(n_obs), range(9))
    assert X.dtype == dtype
    np.testing.assert_array_equal(X, expected_X(range(n_obs), range(9), dtype))


def test_infinite_and_missing_values_are_kept(store: Store, tmp_path: Any) -> None:
    values = np.array([np.nan, np.inf, -np.inf, 1e-45], dtype=np.float32)
    with soma.SparseNDArray.create(str(tmp_path / "X"), type=pa.float32(), shape=(4, 1)) as array:
        array.write(
            pa.table({"soma_dim_0": np.arange(4), "soma_dim_1": np.zeros(4, int), "soma_data": values})
        )
    rows = np.array([3, 2, 1, 0])
    with soma.SparseNDArray.open(str(tmp_path / "X")) as array, store.locator.open() as (_, obs):
        reader = SOMAReader(array, obs, np.array([0]), obs_column_names=["soma_joinid"], obs_joinids=rows)
        [found] = reader.read(rows)
        X = found.X
    np.testing.assert_array_equal(X.slice_tonumpy(slice(None))[:, 0], values[::-1])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("n_pieces", [1, 2, 7, 40])
def test_rows_come_in_as_many_io_batches_as_asked_for_of_almost_equal_size(
    store: Store, dense_store: Store, dense: bool, n_pieces: int
) -> None:
    rows = np.arange(40)[::-1]
    with (dense_store if dense else store).locator.open() as (X, obs):
        reader = SOMAReader(
            X,
            obs,
            np.arange(N_VARS),
            obs_column_names=["soma_joinid"],
            obs_joinids=rows,
            n_pieces=n_pieces,
        )
        sizes = [len(part) for part in reader.read(rows)]
    assert len(sizes) == n_pieces
    assert max(sizes) - min(sizes) <= 1


@pytest.fixture
def dense_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each block that is read of a dense layer."""
    read_dense, n_bytes = soma.DenseNDArray.read, []

    def counted(array: soma.DenseNDArray, **options: Any) -> Any:
        block = read_dense(array, **options)
        n_bytes.append(block.to_numpy().nbytes)
        return block

    monkeypatch.setattr(soma.DenseNDArray, "read", counted)
    return n_bytes


@pytest.mark.parametrize("n_rows", [1, 5, 20, 100])
@pytest.mark.parametrize("var_joinids", [range(N_VARS), [17, 6, 4]])
def test_a_dense_layer_is_read_in_blocks_that_fit_into_the_buffer_of_tiledb(
    dense_store: Store, dense_reads: list[int], n_rows: int, var_joinids: Sequence[int]
) -> None:
    config = {"soma.init_buffer_bytes": n_rows * N_VARS * 4}
    locator = attrs.evolve(dense_store.locator, tiledb_config=config)
    X, _ = read(attrs.evolve(dense_store, locator=locator), range(N_OBS), var_joinids)
    np.testing.assert_array_equal(X, expected_X(range(N_OBS), var_joinids))
    assert max(dense_reads) <= n_rows * N_VARS * 4
    assert sum(dense_reads) <= N_OBS * N_VARS * 4


def test_of_a_dense_layer_rows_that_are_far_apart_are_read_without_those_between(
    dense_store: Store, dense_reads: list[int]
) -> None:
    assert _reader.DENSE_GAP_ROWS == 64
    rows = [0, 1, 2, 67, 70, 134, 135, *range(200, 240), 305]
    X, _ = read(dense_store, rows[::-1])
    np.testing.assert_array_equal(X, expected_X(rows[::-1], range(N_VARS)))
    assert [n_bytes // (N_VARS * 4) for n_bytes in dense_reads] == [3, 69, 40, 1]


@pytest.mark.parametrize(("buffer_rows", "expected"), [(1000, [311]), (150, [128, 128, 55])])
def test_a_dense_layer_is_read_through_as_many_tiles_as_fit_into_the_buffer(
    dense_store: Store, dense_reads: list[int], buffer_rows: int, expected: list[int]
) -> None:
    config = {"soma.init_buffer_bytes": buffer_rows * N_VARS * 4}  # a tile has 64 rows
    locator = attrs.evolve(dense_store.locator, tiledb_config=config)
    read(attrs.evolve(dense_store, locator=locator), range(N_OBS))
    assert [n_bytes // (N_VARS * 4) for n_bytes in dense_reads] == expected


# The store's X has row tiles of 64: 0–63, 64–127, …


def test_rows_that_are_near_in_one_tile_are_asked_for_as_one_range(store: Store) -> None:
    assert row_coords(store, [3, 5, 21, 37]) == slice(3, 37)


def test_rows_that_are_far_apart_are_asked_for_without_those_between(store: Store) -> None:
    assert row_coords(store, [3, 5, 22]).tolist() == [3, 4, 5, 22]


def test_rows_between_two_tiles_are_not_asked_for(store: Store) -> None:
    assert row_coords(store, [60, 62, 66]).tolist() == [60, 61, 62, 66]
    assert row_coords(store, [60, 63, 64, 66]) == slice(60, 66)


@given(rows=st.sets(st.integers(0, N_OBS - 1), min_size=1))
def test_every_wanted_row_is_asked_for_and_no_other_but_near_ones_in_the_same_tile(
    store: Store, rows: set[int]
) -> None:
    coords = row_coords(store, sorted(rows))
    asked = range(coords.start, coords.stop + 1) if isinstance(coords, slice) else coords.tolist()
    assert rows <= set(asked)
    assert len(set(asked)) == len(asked)
    for row in set(asked) - rows:
        before, after = max(k for k in rows if k < row), min(k for k in rows if k > row)
        assert after - before <= _reader.GAP_ROWS
        assert before // 64 == row // 64 == after // 64


# The store's X has column tiles of 8: 0–7, 8–15, 16–22.


def test_all_columns_are_asked_for_as_one_range(store: Store) -> None:
    assert column_coords(store, range(N_VARS)) == slice(0, N_VARS - 1)


def test_in_each_tile_columns_from_the_first_to_the_last_wanted_one_are_asked_for(store: Store) -> None:
    assert column_coords(store, [12, 3, 6, 9]).tolist() == [3, 4, 5, 6, 9, 10, 11, 12]


def test_columns_that_touch_neighbouring_tiles_are_asked_for_as_one_range(store: Store) -> None:
    assert column_coords(store, [12, 8, 3, 7]) == slice(3, 12)


def test_column_tiles_without_a_wanted_column_are_not_asked_for(store: Store) -> None:
    assert column_coords(store, [17, 6, 4]).tolist() == [4, 5, 6, 17]


def test_columns_that_are_far_apart_in_one_tile_are_asked_for_by_their_own_coordinates() -> None:
    X = mock.Mock()
    X.schema_config_options.return_value.dims = json.dumps({"soma_dim_1": {"tile": str(2**41)}})
    far = [0, 2**40, 3 * 2**40, 3 * 2**40 + 7]
    assert _reader._columns_to_read(X, np.array(far)).tolist() == far


def test_columns_beside_the_wanted_ones_are_not_returned(store: Store) -> None:
    X, _ = read(store, range(20), [17, 6, 4])
    np.testing.assert_array_equal(X, expected_X(range(20), [17, 6, 4]))


# obs ------------------------------------------------------------------------------------------------------


def test_every_kind_of_obs_column_comes_back_as_it_was_written(store: Store) -> None:
    joinids = np.array([8, 3, 12, 250, 3])
    columns = [name for name in make_obs(joinids) if name != "soma_joinid"]
    _, obs = read(store, joinids, columns=columns, among=range(N_OBS))
    pd.testing.assert_frame_equal(obs, make_obs(joinids)[columns])


def test_a_column_with_missing_values_has_one_dtype_for_all_batches_of_a_reader(store: Store) -> None:
    without_missing = [1, 7, 11]
    _, obs = read(store, without_missing, columns=["maybe_int", "maybe_bool"], among=range(N_OBS))
    assert obs.dtypes.astype(str).tolist() == ["Int64", "boolean"]
    _, obs = read(store, without_missing, columns=["maybe_int", "maybe_bool"])
    assert obs.dtypes.astype(str).tolist() == ["int64", "bool"]


def test_rows_that_obs_lacks_are_named(store: Store) -> None:
    with pytest.raises(ValueError, match=r"obs_joinids must exist in obs, but 2 do not, 400 for instance"):
        read(store, [3, 400, 401])


# Damage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "dense", "file"),
    [("ms/RNA/X/raw", False, "a0.tdb"), ("ms/RNA/X/raw", True, "a0.tdb"), ("obs", False, "a3.tdb")],
)
def test_what_cannot_be_read_is_told_with_its_address_and_rows_from_a_worker_too(
    tmp_path: Path, array: str, dense: bool, file: str
) -> None:
    uri = make_experiment(tmp_path / "experiment", obs_joinids=range(40), dense=dense)
    with soma.Experiment.open(uri) as experiment:
        store = Store(uri, XLocator.create(experiment, "RNA"))
    [damaged] = (tmp_path / "experiment" / array).glob(f"__fragments/*/{file}")
    damaged.write_bytes(bytes(byte ^ 255 for byte in damaged.read_bytes()))
    dataset = store.dataset(range(5, 40), obs_column_names=["barcode", "n_genes", "is_primary"])
    told = rf"rows 5 to 39 of '[^']*/experiment/{array}' must be readable, but: .*TileDB"
    with pytest.raises(soma.SOMAError, match=told) as caught:
        list(dataset)
    assert isinstance(caught.value.__cause__, soma.SOMAError)
    with pytest.raises(soma.SOMAError, match=told):
        ExceptionWrapper(caught._excinfo, where="in worker 0").reraise()  # as a DataLoader does


def meeting(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the first call of a method of a layer, and that of `obs`, wait for each other."""
    barrier = threading.Barrier(2, timeout=60)

    def patch(kind: Any) -> None:
        method, has_met = getattr(kind, name), threading.Event()

        def call(*arguments: Any, **options: Any) -> Any:
            if not has_met.is_set():
                has_met.set()
                barrier.wait()
            return method(*arguments, **options)

        monkeypatch.setattr(kind, name, call)

    patch(soma.SparseNDArray)
    patch(soma.DataFrame)


def test_a_layer_and_obs_are_opened_at_the_same_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.locator.open():
        pass  # the groups are known from now on
    meeting(monkeypatch, "open")
    with store.locator.open() as (X, obs):
        assert (X.soma_type, obs.soma_type) == ("SOMASparseNDArray", "SOMADataFrame")


def test_obs_is_read_while_the_first_rows_of_x_are(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.arange(20)
    with store.locator.open() as (X, obs):
        options: Any = {"obs_column_names": ["soma_joinid"], "obs_joinids": ids}
        reader = SOMAReader(X, obs, np.arange(N_VARS), use_eager_fetch=True, **options)
        meeting(monkeypatch, "read")
        assert [row for rows in reader.read(ids) for row in rows.obs["soma_joinid"]] == ids.tolist()
