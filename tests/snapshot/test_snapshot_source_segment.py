from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from matrix_source import MatrixReader, MatrixSource, matrix_source
from snapshots import ALL_OBS, make, recording
from stores import N_OBS, N_VARS, Store, expected_X, make_cells, make_obs
from tiledbsoma_ml import MemorySource, QueryIDs
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._soma.source import SOMASource
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.snapshot.format import MANIFEST


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    path = tmp_path_factory.mktemp("sources") / "whole.snapshot"
    return make(path, matrix_source(), obs_column_names=ALL_OBS)


# The same rows --------------------------------------------------------------------------------------------


@given(
    rows=st.lists(st.integers(0, N_OBS - 1), min_size=1, max_size=60),
    columns=st.lists(st.integers(0, N_VARS - 1), unique=True, max_size=N_VARS),
    names=st.lists(st.sampled_from([*ALL_OBS, "soma_joinid"]), unique=True, min_size=1, max_size=4),
)
def test_rows_columns_and_obs_are_those_of_the_source_in_the_order_asked_for(
    whole: Snapshot, rows: list[int], columns: list[int], names: list[str]
) -> None:
    ids, var_joinids = np.array(rows), np.array(columns, dtype=np.int64)
    reader = whole.reader(ids, var_joinids, names, nullable=["maybe_int", "maybe_bool"])
    X = reader.csr(ids)
    np.testing.assert_array_equal(X.toarray(), expected_X(rows, columns))
    assert X.dtype == np.float32
    pd.testing.assert_frame_equal(reader.obs(ids), matrix_source().obs(ids, names))


def test_a_snapshot_of_a_source_says_what_it_holds_and_can_be_verified(whole: Snapshot) -> None:
    assert whole.shape == (N_OBS, N_VARS)
    assert (whole.layer_name, whole.layer_names) == ("X", ("X",))
    assert whole.obs_column_names == tuple(ALL_OBS)
    pd.testing.assert_frame_equal(whole.obs, matrix_source().frame)
    assert whole.var["soma_joinid"].tolist() == list(range(N_VARS))
    [layer] = whole._manifest.layers
    assert [shard.row_start for shard in layer.shards] == [0, 64, 128, 192, 256]
    [origin] = json.loads((whole.path / MANIFEST).read_text())["content"]["sources"]
    assert (origin["uri"], origin["measurement_name"]) == ("source:MatrixSource", "")
    assert (origin["tiledb_timestamp_ms"], origin["versions"]) == (0, {"version": "1"})
    whole.verify()


def test_all_columns_of_var_are_kept_and_joinids_are_added_where_they_lack(path: Path) -> None:
    features = pd.DataFrame({"name": [f"g{j}" for j in range(N_VARS)], "length": np.arange(N_VARS) * 10})
    var = make(path, matrix_source(features=features)).var
    assert list(var) == ["soma_joinid", "name", "length"]
    assert var["soma_joinid"].tolist() == list(range(N_VARS))
    pd.testing.assert_frame_equal(var[["name", "length"]], features)


@pytest.mark.parametrize("n_rows", [0, 1])
def test_few_rows_are_kept_as_well(path: Path, n_rows: int) -> None:
    snapshot = make(path, matrix_source(n_rows), obs_column_names=ALL_OBS)
    snapshot.verify()
    X, obs = snapshot[:]
    assert X.shape == (n_rows, N_VARS)
    assert (len(obs), snapshot.dtype) == (n_rows, np.float32)


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "f4", "f8"]
)
def test_a_layer_keeps_its_dtype_and_every_value(path: Path, dtype: str) -> None:
    X = expected_X(range(70), range(9)).astype(dtype)
    snapshot = make(path, MatrixSource(X, pd.DataFrame(index=range(70))))
    assert snapshot.dtype == dtype
    np.testing.assert_array_equal(snapshot[:][0].toarray(), X)


def test_odd_values_are_kept_bit_for_bit(path: Path) -> None:
    values = np.array([np.nan, -0.0, np.inf, -np.inf, 1e-45, 0.1, 3.4e38], dtype=np.float32)
    values = np.append(values, np.array([0x7FC0_1234, 0xFFC0_0001], dtype=np.uint32).view(np.float32))
    n = len(values)
    X = sparse.csr_matrix((values, np.zeros(n, int), np.arange(n + 1)), shape=(n, 2))
    scores = values.astype(np.float64)
    snapshot = make(path, MatrixSource(X, pd.DataFrame({"score": scores})), obs_column_names=["score"])
    assert snapshot[:][0].data.tobytes() == values.tobytes()
    assert snapshot.obs["score"].to_numpy().tobytes() == scores.tobytes()


def test_rows_that_the_source_keeps_are_neither_written_to_nor_held(path: Path) -> None:
    source = matrix_source()
    X = source.X
    whole = CSR_IO_Buffer(X.indptr.astype(np.int64), X.indices[::-1].astype(">u4"), X.data[::-1], X.shape)
    backwards = X.indptr[-1] - X.indptr[::-1]
    whole.indptr = backwards.astype(np.int64)  # rows from the last to the first, columns descending
    for array in (whole.indptr, whole.indices, whole.data):
        array.flags.writeable = False

    class Kept(MatrixReader):
        def read(self, obs_joinids: np.ndarray) -> Iterator[Rows[CSR_IO_Buffer]]:
            rows = Rows(obs_joinids=np.arange(N_OBS), X=whole, obs=source.frame)
            start, stop = (obs_joinids[0], obs_joinids[-1] + 1) if len(obs_joinids) else (0, 0)
            yield rows.slice(start, stop)

    source.open = lambda ids, fields, budget: Kept(source, ids.var_joinids, [])  # type: ignore[method-assign]
    np.testing.assert_array_equal(
        make(path, source)[:][0].toarray(), expected_X(range(N_OBS)[::-1], range(N_VARS))
    )


def test_a_snapshot_of_an_anndata_has_its_cells_and_genes(path: Path) -> None:
    frame = make_obs(np.arange(40)).drop(columns="soma_joinid")
    columns = {name: frame[name].array for name in frame}
    cells = make_cells(expected_X(range(40), range(5)), obs=columns, var={"length": range(5)})
    source = MemorySource.from_anndata(cells)
    snapshot = make(path, source, obs_column_names=["index", *ALL_OBS])
    np.testing.assert_array_equal(snapshot[:][0].toarray(), cells.X)
    pd.testing.assert_frame_equal(snapshot.obs, source.obs(range(40), ["index", *ALL_OBS]))
    assert snapshot.var["index"].tolist() == cells.var_names.tolist()
    make(path, MemorySource.from_anndata(cells), obs_column_names=["index", *ALL_OBS])
    cells.X = cells.X * 2
    with pytest.raises(ValueError, match=r"content\['X'\] is '\w+' there, not"):
        snapshot.check_holds(MemorySource.from_anndata(cells), ["index"])
    cells.var_names = cells.var_names[::-1]
    other = MemorySource.from_anndata(cells)
    with pytest.raises(ValueError, match="has 'g4' where the first has 'g0'"):
        make(path.with_name("two"), [source, other])


def test_what_a_layer_of_an_experiment_holds_as_it_is_is_kept_as_of_the_experiment(
    path: Path, store: Store
) -> None:
    ids = QueryIDs(obs_joinids=[9, 3, 200], var_joinids=range(N_VARS))
    snapshot = make(path, SOMASource(store.locator, ids), obs_column_names=["cell_type"])
    assert (snapshot.layer_name, snapshot.obs_joinids.tolist()) == ("raw", [3, 9, 200])
    np.testing.assert_array_equal(snapshot[:][0].toarray(), expected_X([3, 9, 200], range(N_VARS)))
    for where in (store.locator, SOMASource(store.locator, ids)):
        snapshot.check_holds(where, ["cell_type"])
        assert make(path, [SOMASource(store.locator, ids)], layer_name="raw", obs_column_names=["cell_type"])
    with pytest.raises(
        ValueError, match="layer_name='X' must be left out, because a Source has the layer 'raw'"
    ):
        make(path, SOMASource(store.locator, ids), layer_name="X")


# Once, and killed -----------------------------------------------------------------------------------------


def test_a_snapshot_of_a_source_is_made_once_and_then_used(path: Path) -> None:
    make(path, matrix_source())
    source = matrix_source()
    asked = recording(source)
    make(path, source)
    assert asked == []


# What is not right ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layer_name": "raw"},
            "layer_name='raw' must be left out, because a Source has the layer 'X' alone",
        ),
        (
            {"layers": ["norm"]},
            r"layers=\['norm'\] must be left out, because a Source has the layer 'X' alone",
        ),
        ({"obsm": ["pca"]}, r"obsm=\['pca'\] must be left out, because a Source has no arrays of obsm"),
        ({"obs_column_names": ["scor"]}, "obs_column_names='scor' must be a column of obs; did you mean"),
        ({"obs_column_names": "score"}, "must be a list of names"),
        ({"obs_column_names": []}, "must hold at least one name"),
        ({"obs_column_names": ["score", "score"]}, "must differ from each other"),
    ],
)
def test_what_a_source_does_not_have_is_refused_before_anything_is_written(
    path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make(path, matrix_source(), **options)
    assert not list(path.parent.iterdir())


def shuffled(rows: Rows[CSR_IO_Buffer]) -> Rows[CSR_IO_Buffer]:
    return rows.take(np.arange(len(rows))[::-1])


def with_X(change: Callable[[CSR_IO_Buffer], CSR_IO_Buffer]) -> Callable[[Any], Any]:
    return lambda rows: Rows(obs_joinids=rows.obs_joinids, X=change(rows.X), obs=rows.obs)


def but_for_one(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a change that leaves the single row alone that is asked for first, to learn the type."""
    return lambda rows: change(rows) if len(rows) > 1 else rows


def of_another_type(X: CSR_IO_Buffer) -> CSR_IO_Buffer:
    return CSR_IO_Buffer(X.indptr, X.indices, X.data.astype(np.float64 if len(X) == 4 else X.dtype), X.shape)


def with_column(column: int) -> Callable[[CSR_IO_Buffer], CSR_IO_Buffer]:
    def change(X: CSR_IO_Buffer) -> CSR_IO_Buffer:
        indices = X.indices.astype(np.int64)
        indices[1:2] = column
        return CSR_IO_Buffer(X.indptr, indices, X.data, X.shape)

    return change


def starting_late(X: CSR_IO_Buffer) -> CSR_IO_Buffer:
    return CSR_IO_Buffer(X.indptr + 1, X.indices, X.data, X.shape)


def wider(X: CSR_IO_Buffer) -> CSR_IO_Buffer:
    return CSR_IO_Buffer(X.indptr, X.indices, X.data, (len(X), N_VARS + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shuffled, "the rows that are asked for, in that order, but gives others"),
        (lambda rows: rows.slice(0, len(rows) - (len(rows) == 4)), r"\d+ rows that are asked for, but gives"),
        (with_X(of_another_type), "values of one type, float32, but gives some of float64"),
        (with_X(with_column(N_VARS)), "rows in compressed sparse form, but gives others, where j must lie"),
        (with_X(with_column(-1)), "rows in compressed sparse form, but gives others, where j must lie"),
        (with_X(starting_late), "rows in compressed sparse form, but gives others, where p must be"),
        (with_X(wider), r"X of shape \(30, 23\), but gives \(30, 24\)"),
    ],
)
def test_a_source_that_gives_what_it_must_not_is_told_and_nothing_is_made(
    path: Path, change: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"'source:MatrixSource' must give {message}.*check_source"):
        make(path, matrix_source(given=but_for_one(change)))
    assert not path.exists()
    make(path, matrix_source()).verify()


def test_a_column_that_a_row_has_twice_is_told(path: Path) -> None:
    def repeat(X: CSR_IO_Buffer) -> CSR_IO_Buffer:
        indices = X.indices.copy()
        indices[X.indptr[1] + 1] = indices[X.indptr[1]]
        return CSR_IO_Buffer(X.indptr, indices, X.data, X.shape)

    with pytest.raises(ValueError, match="must give each column of a row once, but gives one twice in row 1"):
        make(path, matrix_source(given=but_for_one(with_X(repeat))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame[::-1], "obs of the rows that are asked for, in that order, but gives others"),
        (lambda frame: frame[:-1], "obs of 311 rows, but gives 310"),
        (
            lambda frame: frame.assign(more=1),
            r"obs with the columns \['soma_joinid'\], which differ, but gives",
        ),
    ],
)
def test_an_obs_that_does_not_belong_to_the_rows_is_told(path: Path, change: Any, message: str) -> None:
    class Changed(MatrixSource):
        def obs(self, ids: Any, names: Any) -> Any:
            frame = super().obs(ids, names)
            return change(frame) if len(ids) == N_OBS else frame

    with pytest.raises(ValueError, match=f"'source:Changed' must give {message}"):
        make(path, matrix_source(kind=Changed))


@pytest.mark.parametrize(
    "column",
    [
        pd.Series(pd.period_range("2024", periods=N_OBS, freq="D")),
        pd.Series([{1}] * N_OBS),
        pd.Series([1, "a"] * (N_OBS // 2) + [1]),
        pd.Series(np.arange(N_OBS) * 1j),
    ],
    ids=["periods", "sets", "mixed", "complex"],
)
def test_a_column_that_arrow_cannot_hold_is_named(path: Path, column: pd.Series) -> None:
    source = matrix_source()
    source.frame = source.frame.assign(odd=column)
    with pytest.raises(ValueError, match=r"column 'odd' of obs, of type .*, must be one that Arrow can hold"):
        make(path, source, obs_column_names=["odd"])


def test_a_type_of_x_that_a_snapshot_cannot_hold_is_told(path: Path) -> None:
    source = MatrixSource(np.eye(4), make_obs(np.arange(4)))
    source.X = source.X.astype(np.complex64)
    with pytest.raises(ValueError, match=r"layer 'X' must have a type among .*, not <c8; convert it"):
        make(path, source)
    with pytest.raises(TypeError, match="content of 'source:MatrixSource' must be texts by name, but has 7"):
        make(path, matrix_source(content={"version": 7}))


@pytest.mark.parametrize("name", ["given", "var"])
def test_an_error_of_a_file_of_the_source_is_told_as_it_is(path: Path, name: str) -> None:
    def fail(*_: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "cells.h5ad")

    source = matrix_source()
    setattr(source, name, fail)
    with pytest.raises(PermissionError, match=r"^\[Errno 13\] Permission denied: 'cells.h5ad'$"):
        make(path, source)


def test_a_source_is_asked_by_one_thread_at_a_time(path: Path) -> None:
    n_asking, overlaps = [0], []

    class Slow(MatrixSource):
        def obs(self, ids: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
            n_asking[0] += len(ids) == N_OBS
            time.sleep(0.2 if len(ids) == N_OBS else 0)  # long enough that rows are asked for meanwhile
            n_asking[0] -= len(ids) == N_OBS
            return super().obs(ids, names)

    def watched(rows: Any) -> Any:
        overlaps.append(n_asking[0])
        return rows

    make(path, matrix_source(kind=Slow, given=watched), obs_column_names=ALL_OBS)
    assert set(overlaps) == {0}
