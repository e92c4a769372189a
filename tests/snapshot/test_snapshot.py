from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledbsoma as soma
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, WeightedRandomSampler

from stores import MEASUREMENT, N_OBS, N_VARS, Store, expected_X, make_obs, workers
from tiledbsoma_ml._batch.pool import Pool
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml._soma.reader import SOMAReader
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.snapshot import build as _snapshot_build
from tiledbsoma_ml.snapshot import shards as _snapshot_shards
from tiledbsoma_ml.snapshot.files import sealed
from tiledbsoma_ml.snapshot.format import MANIFEST, Manifest
from tiledbsoma_ml.x_locator import XLocator

ALL_OBS = [name for name in make_obs(np.arange(4)) if name != "soma_joinid"]

DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]


def make(path: Path, store: Store, obs: Any = None, var: Any = None, **options: Any) -> Snapshot:
    """Make a snapshot of rows and columns of a store, in shards of one row tile."""
    with pytest.MonkeyPatch.context() as patch, store.query(obs, var) as query:
        patch.setattr(_snapshot_build, "MIN_SHARD_BYTES", 1)
        patch.setattr(_snapshot_build, "MIN_SHARDS", 1000)
        return Snapshot.create(path, query, **{"progress": False, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("snapshots")


@pytest.fixture(scope="module")
def whole(store: Store, folder: Path) -> Snapshot:
    """All of the store, in five shards."""
    return make(folder / "whole.snapshot", store, obs_column_names=ALL_OBS)


@pytest.fixture
def copied(whole: Snapshot, tmp_path: Path) -> Path:
    """A copy of the whole one, to be damaged."""
    return Path(shutil.copytree(whole.path, tmp_path / "copied.snapshot"))


def read_soma(store: Store, rows: Sequence[int], columns: Sequence[int], names: Sequence[str]) -> Any:
    """Return rows as the experiment gives them."""
    with store.locator.open() as (X, obs):
        ids, columns = (np.asarray(joinids, dtype=np.int64) for joinids in (rows, columns))
        reader = SOMAReader(X, obs, columns, obs_column_names=names, obs_joinids=ids)
        [found] = reader.read(ids)
    return found.X, found.obs


def add_array(store: Store, group: str, name: str, values: np.ndarray, dense: bool = False) -> None:
    """Add an array of this content to `X` or `obsm` of a store."""
    kind, pa_type = (soma.DenseNDArray if dense else soma.SparseNDArray), pa.from_numpy_dtype(values.dtype)
    with soma.Experiment.open(store.uri, "w") as experiment:
        measurement = experiment.ms[MEASUREMENT]
        collection = measurement[group] if group in measurement else measurement.add_new_collection(group)
        add = collection.add_new_dense_ndarray if kind is soma.DenseNDArray else None
        array = (add or collection.add_new_sparse_ndarray)(name, type=pa_type, shape=values.shape)
        if dense:
            array.write((), pa.Tensor.from_numpy(values))
        else:
            write_entries(array, *values.nonzero(), values[values.nonzero()])


def write_entries(array: soma.SparseNDArray, i: np.ndarray, j: np.ndarray, values: np.ndarray) -> None:
    array.write(
        pa.table({"soma_dim_0": i.astype(np.int64), "soma_dim_1": j.astype(np.int64), "soma_data": values})
    )


# The same rows as from SOMA -------------------------------------------------------------------------------


@given(
    rows=st.lists(st.integers(0, N_OBS - 1), min_size=1, max_size=60),
    columns=st.lists(st.integers(0, N_VARS - 1), unique=True, max_size=N_VARS),
    names=st.lists(st.sampled_from([*ALL_OBS, "soma_joinid"]), unique=True, min_size=1, max_size=4),
)
def test_rows_columns_and_obs_are_those_of_the_experiment_in_the_order_asked_for(
    store: Store, whole: Snapshot, rows: list[int], columns: list[int], names: list[str]
) -> None:
    X, obs = read_soma(store, rows, columns, names)
    dense = X.slice_tonumpy(slice(None))
    ids, var_joinids = np.array(rows), np.array(columns, dtype=np.int64)
    reader = whole.reader(ids, var_joinids, names)

    read = reader.rows(ids)
    found, found_obs = read.X, read.obs
    assert read.obs_joinids.tolist() == rows
    pd.testing.assert_frame_equal(found_obs, obs)
    assert (found.dtype, found.indices.dtype, found.shape) == (X.dtype, X.indices.dtype, X.shape)
    np.testing.assert_array_equal(found.slice_tonumpy(slice(None)), dense)

    csr = reader.csr(ids)
    np.testing.assert_array_equal(csr.toarray(), dense)
    assert (csr.dtype, csr.indices.dtype, csr.indptr.dtype) == (dense.dtype, np.int32, np.int32)
    assert all(
        (np.diff(csr.indices[a:b]) > 0).all() for a, b in zip(csr.indptr, csr.indptr[1:], strict=False)
    )

    out = np.full_like(dense, 7)
    reader.fill_dense(ids, out)
    np.testing.assert_array_equal(out, dense)
    pd.testing.assert_frame_equal(reader.obs(ids), obs)


def test_a_reader_gives_out_many_rows_in_several_pieces(
    whole: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiledbsoma_ml.snapshot.reader.READ_ROWS", 100)
    rows = np.random.default_rng(0).permutation(N_OBS)
    pieces = list(whole.reader(None, None, ["soma_joinid"]).read(rows))
    assert [len(piece) for piece in pieces] == [100, 100, 100, 11]
    found = Rows.concat(pieces)
    assert found.obs["soma_joinid"].tolist() == found.obs_joinids.tolist() == rows.tolist()
    np.testing.assert_array_equal(found.X.slice_tonumpy(slice(None)), expected_X(rows, range(N_VARS)))


@pytest.mark.parametrize("query", [[5, 9, 100, 101, 310], slice(60, 70), "cell_type == 'B cell'", []])
@pytest.mark.parametrize("var", [None, [3, 7, 20]])
def test_a_snapshot_holds_the_rows_and_columns_of_its_query(
    store: Store, tmp_path: Path, query: Any, var: list[int] | None
) -> None:
    snapshot = make(tmp_path / "part.snapshot", store, query, var, obs_column_names=["score"])
    with store.query(query, var) as asked:
        assert sorted(asked.obs_joinids().to_pylist()) == snapshot.obs_joinids.tolist()
        assert asked.var_joinids().to_pylist() == snapshot.var_joinids.tolist()
    X, obs = snapshot[:]
    expected = expected_X(snapshot.obs_joinids, snapshot.var_joinids)
    np.testing.assert_array_equal(X.toarray(), expected)
    assert (snapshot.shape, len(snapshot)) == (expected.shape, len(expected))
    assert snapshot.nnz == np.count_nonzero(expected)
    assert obs["score"].tolist() == (snapshot.obs_joinids / 7).tolist()
    snapshot.verify()


def test_scattered_joinids_are_found_also_where_they_are_far_apart(make_store: Any, tmp_path: Path) -> None:
    joinids = np.unique(np.r_[3, 5, 1000, np.arange(7000, 7100, 3), 40_000])
    sparse = make_store(obs_joinids=joinids, n_vars=4)
    reader = make(tmp_path / "far.snapshot", sparse).reader()
    rows = np.random.default_rng(0).choice(joinids, 200)
    found = reader.rows(rows)
    assert found.obs["soma_joinid"].tolist() == rows.tolist()
    np.testing.assert_array_equal(found.X.slice_tonumpy(slice(None)), expected_X(rows, range(4)))
    for missing in (2, 4, 999, 7001, 39_999, 40_001, -1):
        with pytest.raises(ValueError, match=f"1 of 2 are not, {missing} for instance"):
            reader.rows(np.array([5, missing]))


def test_obs_and_var_are_kept_with_all_their_categories(store: Store, whole: Snapshot) -> None:
    pd.testing.assert_frame_equal(whole.obs, make_obs(np.arange(N_OBS))[ALL_OBS])
    assert whole.var["feature_id"].tolist() == [f"gene{j}" for j in range(N_VARS)]
    assert whole.var["soma_joinid"].tolist() == list(range(N_VARS))
    _, obs = whole[[0]]
    assert "unseen" in obs["cell_type"].cat.categories


def test_threads_may_read_from_one_reader_at_once(whole: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "SMALL", 1)
    reader = whole.reader(None, None, ["soma_joinid"])

    def read(seed: int) -> None:
        rows = np.random.default_rng(seed).integers(0, N_OBS, 3000)
        X, found = reader.csr(rows), reader.rows(rows)
        expected = expected_X(rows, range(N_VARS))
        np.testing.assert_array_equal(X.toarray(), expected)
        np.testing.assert_array_equal(found.X.slice_tonumpy(slice(None)), expected)
        assert found.obs["soma_joinid"].tolist() == rows.tolist()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(64)))


# Values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_keeps_its_dtype_and_every_value(make_store: Any, folder: Path, dtype: str) -> None:
    n_obs = 12 if np.dtype(dtype).itemsize == 1 else 30
    typed = make_store(dtype=dtype, obs_joinids=range(n_obs), n_vars=9)
    X, _ = make(folder / f"{dtype}.snapshot", typed)[:]
    assert X.dtype == dtype
    np.testing.assert_array_equal(X.toarray(), expected_X(range(n_obs), range(9), dtype))


EDGES = {
    "u1": [0, 255],
    "u2": [256, 65_535],
    "u4": [65_536, 2**24, 2**24 + 1, 2**32 - 1],
    "i1": [-1, -128, 127],
    "i2": [-129, 200, -32_768],
    "i4": [-32_769, 60_000, -(2**31)],
    "f4": [0.5, -0.0, np.nan, np.inf, -np.inf, 1e-45, 3.4e38, -1.0, 2.0**33],
}


@pytest.mark.parametrize(
    ("dtype", "kinds", "stored"),
    [
        ("float32", ["u1"], "|u1"),
        ("float32", ["u1", "u2"], "<u2"),
        ("float32", ["u4"], "<f4"),
        ("float32", ["u2", "f4"], "<f4"),
        ("float64", ["u1", "u2"], "<u2"),
        ("float64", ["u2", "f4"], "<f4"),
        ("float64", ["u4"], "<u4"),
        ("float64", ["u4", "f4"], "<f8"),
        ("int64", ["u1", "u2"], "<u2"),
        ("int64", ["i1"], "|i1"),
        ("int64", ["u1", "i1"], "<i2"),
        ("int32", ["i1", "i2"], "<i2"),
        ("int64", ["i4", "u2"], "<i4"),
        ("int64", ["u4"], "<u4"),
        ("int64", ["i1", "u4"], "<i8"),
        ("uint64", ["u1", "u4"], "<u4"),
        ("int16", ["u1", "i1"], "<i2"),
    ],
)
def test_values_are_stored_in_the_smallest_type_that_holds_all_of_a_shard_bit_for_bit(
    make_store: Any, tmp_path: Path, dtype: str, kinds: list[str], stored: str
) -> None:
    values = np.concatenate([np.array(EDGES[kind]).astype(kind).astype(dtype) for kind in kinds])
    typed = make_store(dtype=dtype, obs_joinids=range(70), n_vars=2)
    everywhere = np.zeros((70, 2), dtype)
    everywhere[: len(values), 0] = values
    with soma.SparseNDArray.open(f"{typed.uri}/ms/{MEASUREMENT}/X/raw", "w") as X:
        write_entries(X, *np.divmod(np.arange(2 * 70), 2), everywhere.ravel())
    snapshot = make(tmp_path / "edges.snapshot", typed)
    [layer] = snapshot._manifest.layers
    assert [shard.data_dtype for shard in layer.shards] == [stored, "|u1"]
    reader = snapshot.reader()
    rows = snapshot.obs_joinids[: len(values)]
    for found in (reader.csr(rows)[:, 0].data, reader.rows(rows).X.data[::2], dense_of(reader, rows)[:, 0]):
        assert found.dtype == dtype
        assert found.tobytes() == values.tobytes()


def dense_of(reader: Any, rows: np.ndarray) -> np.ndarray:
    out = np.empty((len(rows), reader.n_vars), reader.dtype)
    reader.fill_dense(rows, out)
    return out


@given(
    parts=st.lists(st.lists(st.integers(-40_000, 2**33) | st.integers(-200, 300), min_size=1), max_size=3),
    dtype=st.sampled_from(DTYPES),
    factor=st.sampled_from([1.0, 0.5, 0.1]),
)
def test_the_type_of_a_shard_holds_every_value_and_no_smaller_one_does(
    parts: list[list[int]], dtype: str, factor: float
) -> None:
    scale = factor if np.dtype(dtype).kind == "f" else 1
    arrays = [(np.array(part) * scale).astype(dtype) for part in parts]
    kept = [array.astype(_snapshot_shards.narrowed(array)) for array in arrays]
    chosen = _snapshot_shards.smallest(kept, np.dtype(dtype))

    def holds(name: str) -> bool:
        with np.errstate(all="ignore"):
            return all(array.astype(name).astype(dtype).tobytes() == array.tobytes() for array in arrays)

    assert holds(chosen.name)
    names = {
        "f": ["u1", "u2", "u4", "f4"],
        "u": ["u1", "u2", "u4"],
        "i": ["u1", "i1", "u2", "i2", "u4", "i4"],
    }
    for name in names[np.dtype(dtype).kind]:
        if np.dtype(name).itemsize < chosen.itemsize:
            # A cast that wraps and wraps back is no sign that a type holds a value.
            limits = np.iinfo(name) if name != "f4" else None
            inside = limits is None or all(limits.min <= a.min() and a.max() <= limits.max for a in arrays)
            assert not (inside and holds(name))


def test_more_columns_than_16_bits_number_are_kept(make_store: Any, tmp_path: Path) -> None:
    wide = make_store(obs_joinids=range(3), n_vars=70_000, tile=(64, 70_000))
    snapshot = make(tmp_path / "wide.snapshot", wide)
    assert snapshot._manifest.layers[0].indices_dtype == "<u4"
    np.testing.assert_array_equal(snapshot[:][0].toarray(), expected_X(range(3), range(70_000)))
    few = np.array([69_999, 4, 65_536])
    X = snapshot.reader(None, few).rows(np.array([2, 0])).X
    assert X.indices.dtype == np.uint16
    np.testing.assert_array_equal(X.slice_tonumpy(slice(None)), expected_X([2, 0], few))


# More than one layer, more than one query -----------------------------------------------------------------


def test_further_layers_and_obsm_sparse_or_dense_are_kept(make_store: Any, tmp_path: Path) -> None:
    rich = make_store()
    scaled = expected_X(range(N_OBS), range(N_VARS), np.float64) / 3 - 0.25
    pca = np.random.default_rng(0).normal(size=(N_OBS, 5)).astype(np.float32)
    add_array(rich, "X", "scaled", scaled, dense=True)
    add_array(rich, "obsm", "pca", pca, dense=True)
    add_array(rich, "obsm", "umap", pca[:, :2].astype(np.float64))
    options = {"layer_name": "raw", "layers": ["scaled"], "obsm": ["pca", "umap"]}
    snapshot = make(tmp_path / "rich.snapshot", rich, slice(50, 250), [2, 3, 8], **options)
    assert snapshot.layer_names == ("raw", "scaled")
    X = snapshot.reader(layer_name="scaled").csr(np.array([249, 50]))
    assert X.toarray().tobytes() == scaled[[249, 50]][:, [2, 3, 8]].tobytes()
    np.testing.assert_array_equal(snapshot.obsm["pca"], pca[50:251])
    np.testing.assert_array_equal(snapshot.obsm["umap"], pca[50:251, :2].astype(np.float64))
    adata = snapshot.to_anndata([200, 0])
    np.testing.assert_array_equal(adata.layers["scaled"].toarray(), scaled[[250, 50]][:, [2, 3, 8]])
    np.testing.assert_array_equal(adata.obsm["pca"], pca[[250, 50]])
    snapshot.verify()
    with pytest.raises(ValueError, match=r"layer_name='norm' must be a layer in the snapshot"):
        snapshot.reader(layer_name="norm")


def test_a_dense_layer_is_read_like_a_sparse_one(make_store: Any, tmp_path: Path) -> None:
    dense = make_store(dense=True, dtype=np.int32)
    X, _ = make(tmp_path / "dense.snapshot", dense, slice(3, 200))[:]
    np.testing.assert_array_equal(X.toarray(), expected_X(range(3, 201), range(N_VARS)))


@pytest.fixture(scope="module")
def both(make_store: Any, store: Store, folder: Path) -> Snapshot:
    """Rows of two experiments, of which some have the same joinids."""
    other = make_store(obs_joinids=range(100))
    with store.query([5, 90, 300]) as first, other.query(slice(80, 99)) as second:
        return Snapshot.create(
            folder / "both.snapshot", [first, second], obs_column_names=["cell_type"], progress=False
        )


def test_rows_of_several_queries_follow_each_other(both: Snapshot) -> None:
    joinids = [5, 90, 300, *range(80, 100)]
    assert both.obs_joinids.tolist() == joinids
    X, obs = both[:]
    np.testing.assert_array_equal(X.toarray(), expected_X(joinids, range(N_VARS)))
    assert obs["soma_source"].tolist() == 3 * [0] + 20 * [1]
    assert obs["cell_type"].tolist() == make_obs(np.array(joinids))["cell_type"].tolist()
    assert both.obs_column_names == ("cell_type", "soma_source")
    both.verify()


def test_rows_of_several_queries_are_read_by_their_numbers_as_joinids_repeat(both: Snapshot) -> None:
    ids = both.query_ids
    assert ids.obs_joinids.tolist() == list(range(23))
    rows = both.reader(ids.obs_joinids, ids.var_joinids, ["soma_joinid"]).rows(np.array([13, 1]))
    assert rows.obs["soma_joinid"].tolist() == [90, 90]


def test_queries_on_other_columns_or_features_are_refused(
    make_store: Any, store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "x.snapshot"
    message = r"must be several ones on the same columns, but .* has 2 other"
    with store.query() as first, store.query(var=[1, 2]) as second, pytest.raises(ValueError, match=message):
        Snapshot.create(path, [first, second], progress=False)
    other = make_store(obs_joinids=range(3))
    with soma.DataFrame.open(f"{other.uri}/ms/{MEASUREMENT}/var", "w") as var:
        var.write(pa.table({"soma_joinid": [4], "feature_id": ["ACTB"]}))
    message = "has 'ACTB' where the first has 'gene4'"
    with store.query() as first, other.query() as second, pytest.raises(ValueError, match=message):
        Snapshot.create(path, [first, second], progress=False)
    with pytest.raises(ValueError, match=r"query=\[\] must hold at least one query"):
        Snapshot.create(path, [], progress=False)
    assert not path.exists()


# Map-style ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (7, [7]),
        (-1, [N_OBS - 1]),
        (np.int64(3), [3]),
        (slice(10, 20), range(10, 20)),
        (slice(None, None, -50), range(N_OBS - 1, -1, -50)),
        ([3, 5, 3], [3, 5, 3]),
        (np.array([-2, 0]), [N_OBS - 2, 0]),
        (np.arange(N_OBS) % 60 == 1, range(1, N_OBS, 60)),
        ([], []),
    ],
)
def test_indexing_gives_rows_as_numpy_does(whole: Snapshot, index: Any, rows: Sequence[int]) -> None:
    X, obs = whole[index]
    np.testing.assert_array_equal(X.toarray(), expected_X(rows, range(N_VARS)).reshape(-1, N_VARS))
    pd.testing.assert_frame_equal(obs, make_obs(np.array(rows, dtype=np.int64))[ALL_OBS], check_dtype=False)


def test_rows_that_are_not_there_are_an_index_error(whole: Snapshot) -> None:
    for index in (N_OBS, -N_OBS - 1, [0, N_OBS]):
        with pytest.raises(IndexError):
            whole[index]


def identity(item: Any) -> Any:
    return item


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_data_loader_takes_mini_batches_in_the_order_of_any_sampler(
    whole: Snapshot, n_workers: int
) -> None:
    weights = [float(i < 10) for i in range(N_OBS)]
    for sampler in (RandomSampler(whole), WeightedRandomSampler(weights, 40)):
        batches = BatchSampler(sampler, batch_size=16, drop_last=False)
        loader = DataLoader(whole, sampler=batches, batch_size=None, **workers(n_workers))
        rows = []
        for X, obs in loader:
            joinids = obs["n_genes"].tolist()
            rows += joinids
            np.testing.assert_array_equal(X.toarray(), expected_X(joinids, range(N_VARS)))
        if isinstance(sampler, RandomSampler):
            assert sorted(rows) == list(range(N_OBS))
            if n_workers:
                return
        else:
            assert len(rows) == 40
            assert max(rows) < 10


def test_a_snapshot_is_pickled_as_its_path(whole: Snapshot, copied: Path, store: Store) -> None:
    pickled = pickle.dumps(whole)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled)[[5]][0].toarray(), whole[5][0].toarray())
    replaced = pickle.dumps(Snapshot.open(copied))
    shutil.rmtree(copied)
    make(copied, store, [1, 2])
    with pytest.raises(ValueError, match="must be the one that was pickled"):
        pickle.loads(replaced)


def test_to_anndata_gives_rows_as_an_anndata(whole: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, expected in ((None, range(N_OBS)), ([7, 2], [7, 2]), (slice(4), range(4))):
        adata = whole.to_anndata(rows)
        np.testing.assert_array_equal(adata.X.toarray(), expected_X(expected, range(N_VARS)))
        assert adata.obs["n_genes"].tolist() == list(expected)
        assert adata.var["feature_id"].tolist() == whole.var["feature_id"].tolist()
    monkeypatch.setitem(sys.modules, "anndata", None)
    with pytest.raises(ImportError, match="pip install"):
        whole.to_anndata()


# Memory ---------------------------------------------------------------------------------------------------


def test_reading_all_rows_over_and_over_keeps_no_more_memory_than_a_limit(
    whole: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "SMALL", 1)
    reader = whole.reader(kept_bytes=2**14)
    for n in range(50, N_OBS, 20):
        reader.csr(whole.query_ids.obs_joinids[:n])
    assert 0 < reader.kept_bytes <= 2**14


def test_mini_batches_that_are_held_stay_as_they_are(
    whole: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "SMALL", 1)
    reader = whole.reader()
    rng = np.random.default_rng(0)
    held = []
    for _ in range(20):
        rows = rng.integers(0, N_OBS, 400)
        X = reader.csr(rows)
        if len(held) < 10 and rng.random() < 0.5:
            held.append((rows, X if rng.random() < 0.5 else X.data, X.toarray()))
    for rows, kept, X in held:
        np.testing.assert_array_equal(X, expected_X(rows, range(N_VARS)))
        data = kept if isinstance(kept, np.ndarray) else kept.data
        np.testing.assert_array_equal(data, X[X != 0])


# Files ----------------------------------------------------------------------------------------------------


def test_a_snapshot_is_opened_without_reading_data(whole: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiledbsoma_ml.snapshot.mapped.map_file", None)
    monkeypatch.setattr("tiledbsoma_ml.snapshot.reader.map_file", None)
    opened = Snapshot.open(whole.path)
    assert opened.shape == (N_OBS, N_VARS)
    assert opened.nnz == np.count_nonzero(expected_X(range(N_OBS), range(N_VARS)))
    sizes = [path.stat().st_size for path in whole.path.iterdir() if path.name != MANIFEST]
    assert opened.nbytes == sum(sizes)
    assert opened.layer_name == "raw"
    assert opened.obs_column_names == tuple(ALL_OBS)
    assert str(whole.path) in repr(opened)


def code_blocks(path: Path) -> Iterator[str]:
    yield from re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def test_the_reader_of_the_format_document_reads_a_snapshot_with_numpy_alone(whole: Snapshot) -> None:
    [code] = code_blocks(Path(__file__).parents[2] / "docs" / "snapshot_format.md")
    assert len(code.strip().splitlines()) <= 25
    names: dict[str, Any] = {}
    exec(code, names)
    rows = [310, 0, 64, 63, 3]
    X = names["read_rows"](whole.path, rows)
    assert X.dtype == np.float32
    np.testing.assert_array_equal(X, expected_X(rows, range(N_VARS)))


def files_of(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_verify_finds_a_byte_that_was_flipped_in_any_file_and_names_both_checksums(
    whole: Snapshot, copied: Path, place: str
) -> None:
    snapshot = Snapshot.open(copied)
    snapshot.verify()
    for name in files_of(copied):
        file = copied / name
        content = file.read_bytes()
        if not content:
            continue
        k = {"first": 0, "middle": len(content) // 2, "last": len(content) - 1}[place]
        for flip in (0x01, 0x80, 0x07):  # the last one turns "\n" into "\r"
            file.write_bytes(content[:k] + bytes([content[k] ^ flip]) + content[k + 1 :])
            with pytest.raises(ValueError, match=re.escape(name)) as raised:
                snapshot.verify()
            if name != MANIFEST:
                assert len(re.findall(r"\b[0-9a-f]{64}\b", str(raised.value))) == 2
        file.write_bytes(content)
    snapshot.verify()


@given(data=st.data())
def test_no_flip_in_the_manifest_goes_unseen(whole: Snapshot, folder: Path, data: Any) -> None:
    content = (whole.path / MANIFEST).read_bytes()
    k, flip = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(1, 255))
    (folder / "flipped").mkdir(exist_ok=True)
    (folder / "flipped" / MANIFEST).write_bytes(content[:k] + bytes([content[k] ^ flip]) + content[k + 1 :])
    with pytest.raises(ValueError, match=MANIFEST):
        Manifest.read(folder / "flipped")


def test_missing_and_truncated_files_are_named_when_a_snapshot_is_opened(copied: Path) -> None:
    for name in files_of(copied):
        file = copied / name
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(ValueError, match=f"{re.escape(name)}.*"):
            Snapshot.open(copied)
        file.write_bytes(content[:-1] if content else b"more")
        with pytest.raises(ValueError, match=re.escape(name)) as raised:
            Snapshot.open(copied)
        if name != MANIFEST:
            assert re.search(rf"must have {len(content):,} bytes \(SHA-256 \w+\), not", str(raised.value))
        file.write_bytes(content)
    Snapshot.open(copied)


def with_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a snapshot; its checksum and those of all files are made to fit."""
    fields = json.loads((path / MANIFEST).read_text())
    del fields["sha256"]
    change(fields)
    for file in all_files(fields):
        if (path / file["name"]).is_file():
            file["sha256"] = hashlib.sha256((path / file["name"]).read_bytes()).hexdigest()
    (path / MANIFEST).write_text(sealed(fields))


def all_files(fields: Any) -> Iterator[dict[str, Any]]:
    if isinstance(fields, dict) and "nbytes" in fields and isinstance(fields["name"], str):
        yield fields
    elif isinstance(fields, dict | list):
        for value in fields.values() if isinstance(fields, dict) else fields:
            yield from all_files(value)


def set_value(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """Return what sets the last of some keys to a value."""
    *where, last, value = keys

    def change(fields: Any) -> None:
        for key in where:
            fields = fields[key]
        fields[last] = value

    return change


SHARD = ("layers", 0, "shards", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_value("obs", "name", "../obs.arrow"), "'../obs.arrow' is no plain name"),
        (set_value("obs", "name", ".."), "is no plain name"),
        (set_value("obs", "name", MANIFEST), "is no plain name"),
        (set_value(*SHARD, "data", "name", "shard-00000.data"), "two files have one name"),
        (set_value(*SHARD, "data_dtype", "<f8"), "has values of '<f8', in which '<f4' is not kept"),
        (set_value(*SHARD, "data_dtype", "|O"), "has values of '|O'"),
        (set_value(*SHARD, "nnz", 3), "not the 6 of 3 values of '<u2'"),
        (set_value(*SHARD, "nnz", 2**62), "has more values than 64 rows of 23 columns"),
        (set_value(*SHARD, "row_start", 63), "has rows 63 to 128, not from 64 on"),
        (set_value("layers", 0, "shards", -1, "row_stop", N_OBS + 1), "bytes, not the"),
        (lambda fields: fields["layers"][0]["shards"].pop(), "end with row 256, not 311"),
        (set_value("layers", 0, "dtype", "|O"), "has the dtype '|O', which is none of X"),
        (set_value("layers", 0, "indices_dtype", "<u4"), "has indices of '<u4', not '<u2'"),
        (set_value("layers", []), "has other layers than"),
        (set_value("content", "n_vars", 22), "fingerprint"),
        (set_value("obs_joinids", "nbytes", 8), "obs_joinids has 8 bytes, not the"),
        (set_value(*SHARD, "nnz", "3"), "must be a manifest, but 'nnz' must be"),
        (set_value(*SHARD, "nnz", -3), "must be a manifest, but 'nnz' must be >= 0"),
        (set_value("layers", 0, "shards", 7), "must be a manifest, but"),
        (lambda fields: fields.pop("var"), "must be a manifest, but lacks 'var'"),
    ],
)
def test_a_manifest_that_does_not_fit_together_is_refused_whatever_its_checksum(
    copied: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with_manifest(copied, change)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        Snapshot.open(copied)
    assert MANIFEST in str(raised.value)


def test_files_that_are_links_or_folders_are_refused(copied: Path, tmp_path: Path) -> None:
    for name in ("shard-00001.data", MANIFEST):
        (copied / name).rename(tmp_path / name)
        (copied / name).symlink_to(tmp_path / name)
        with pytest.raises(ValueError, match=f"{re.escape(name)}' must be a plain file, no link"):
            Snapshot.open(copied)
        (copied / name).unlink()
        (copied / name).mkdir()
        with pytest.raises(
            ValueError, match=f"{re.escape(name)}' must be a plain file, no link and no folder"
        ):
            Snapshot.open(copied)
        (copied / name).rmdir()
        (tmp_path / name).rename(copied / name)
    Snapshot.open(copied)


def in_array(dtype: str, place: int, value: int) -> Callable[[bytes], bytes]:
    """Return what sets a value of an array, given as bytes."""

    def change(content: bytes) -> bytes:
        values = np.frombuffer(content, dtype).copy()
        values[place] = value
        return values.tobytes()

    return change


def other_arrow(change: Callable[[pa.Table], pa.Table]) -> Callable[[bytes], bytes]:
    """Return what changes a table, given as an Arrow IPC file."""

    def changed(content: bytes) -> bytes:
        sink, table = pa.BufferOutputStream(), change(pa.ipc.open_file(content).read_all())
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    return changed


def bad_codes(table: pa.Table) -> pa.Table:
    codes = pa.array(np.full(len(table), 99, np.int8))
    column = pa.DictionaryArray.from_arrays(codes, pa.array(["a"]), safe=False)
    return table.set_column(table.column_names.index("cell_type"), "cell_type", column)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("shard-00001.indptr", in_array("<i8", 0, 1), "must lead from 0 to"),
        ("shard-00001.indptr", in_array("<i8", -1, 2**40), "must lead from 0 to"),
        ("shard-00001.indptr", in_array("<i8", 5, 2**40), "must not descend, but does after row 69"),
        ("shard-00001.indptr", in_array("<i8", 5, -(2**62)), "must not descend, but does after row 68"),
        ("shard-00001.indices", in_array("<u2", 0, N_VARS), "columns below 23, but .*row 64"),
        ("shard-00001.indices", in_array("<u2", -1, 65_535), "columns below 23, but .*row 127"),
        ("shard-00001.indices", in_array("<u2", 0, 22), None),  # exists, but is not ascending
        ("obs_joinids", in_array("<i8", 7, 5), "must hold ascending joinids, but has 5 after 6"),
        ("obs_joinids", in_array("<i8", 0, -1), "must hold no negative joinids"),
        ("obs_joinids", in_array("<i8", -1, N_OBS), None),
        ("var_joinids", in_array("<i8", -1, N_VARS), None),
        ("obs.arrow", lambda _: b"no Arrow", "must be an Arrow IPC file"),
        ("obs.arrow", other_arrow(lambda table: table.slice(1)), "must have 311 rows, but has 310"),
        ("obs.arrow", other_arrow(bad_codes), "must hold a column 'cell_type', but"),
        ("obs.arrow", other_arrow(lambda table: table.drop(["score"])), "must have the column 'score'"),
        ("var.arrow", other_arrow(lambda table: table[::-1]), None),
    ],
)
def test_damage_that_goes_with_its_checksum_is_told_by_verify_and_before_it_harms(
    copied: Path, name: str, damage: Callable[[bytes], bytes], message: str | None
) -> None:
    content = damage((copied / name).read_bytes())
    (copied / name).write_bytes(content)
    with_manifest(
        copied, lambda fields: [f.update(nbytes=len(content)) for f in all_files(fields) if f["name"] == name]
    )
    pattern = f"{name}.* {message}.*: it is damaged"
    with nullcontext() if message is None else pytest.raises(ValueError, match=pattern):
        snapshot = Snapshot.open(copied)
        X, _ = snapshot[:]
        np.testing.assert_array_equal(X.toarray(), dense_of(snapshot.reader(), snapshot.obs_joinids))
    with pytest.raises(ValueError, match=f"{re.escape(name)}.*it is damaged"):
        Snapshot(copied, Manifest.read(copied)).verify()


FUZZ = """
import os, random, resource, shutil, sys
from pathlib import Path
import numpy as np
from test_snapshot import MANIFEST, Snapshot, with_manifest

source, path = Path(sys.argv[1]), Path(sys.argv[2])
names = sorted(file.name for file in source.iterdir() if file.stat().st_size and file.name != MANIFEST)
rng = random.Random(0)

def read(snapshot):
    ids, found = snapshot.query_ids.obs_joinids, []
    some = snapshot.var_joinids[[7, 3, 20]]
    for reader in (snapshot.reader(), snapshot.reader(ids, some, ["soma_joinid"])):
        X, dense = reader.csr(ids[::-1]), np.empty((len(ids), reader.n_vars), reader.dtype)
        X @ X.T
        reader.fill_dense(ids[::-1], dense)
        found += [X.toarray(), dense, *(rows.X.slice_tonumpy(slice(None)) for rows in reader.read(ids))]
    return [array.tobytes() for array in found] + [snapshot.obs.to_csv(), snapshot.var.to_csv()]

right, results = read(Snapshot.open(source)), []
for k in range(120):
    content = bytearray((source / names[k % len(names)]).read_bytes())
    for _ in range(rng.choice([1, 1, 3])):
        place = rng.randrange(len(content))
        content[place] = rng.choice([content[place] ^ 1 << rng.randrange(8), 0, 127, 255])
    (path / names[k % len(names)]).write_bytes(content)
    is_same = content == (source / names[k % len(names)]).read_bytes()
    if is_fitted := k % 3 > 0:
        with_manifest(path, lambda fields: None)
    try:
        results.append("right" if read(Snapshot.open(path)) == right else "other")
    except ValueError as err:
        assert str(path) in str(err), err
        results.append("told")
    try:
        Snapshot(path, Snapshot.open(source)._manifest).verify()
        assert is_same or is_fitted
    except ValueError as err:
        assert str(path) in str(err), err
        assert not is_same
    for name in (names[k % len(names)], MANIFEST):
        shutil.copy(source / name, path / name)

snapshot = Snapshot.open(path)
reader = snapshot.reader()
if not (child := os.fork()):
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.truncate(path / "shard-00001.indices", 0)
    reader.csr(snapshot.obs_joinids)
    os._exit(0)
_, status = os.waitpid(child, 0)
print(*(f"{results.count(result)} {result}" for result in ("right", "other", "told")), status, "status")
"""


def test_bytes_that_change_in_any_file_never_end_a_process_but_a_file_that_is_cut_while_it_is_mapped_does(
    whole: Snapshot, copied: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    command = [sys.executable, "-c", FUZZ, str(whole.path), str(copied)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = dict(zip(done.stdout.split()[1::2], map(int, done.stdout.split()[::2]), strict=True))
    assert counts["told"] > 10
    assert counts["other"] > 10
    assert os.WTERMSIG(counts["status"]) == signal.SIGBUS
    with pytest.raises(ValueError, match=r"shard-00001\.indices' must have .* bytes .*, not 0"):
        Snapshot.open(copied)


def test_a_newer_format_is_refused(copied: Path) -> None:
    text = (copied / MANIFEST).read_text().replace('"format_version": 1', '"format_version": 2')
    (copied / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"must have format_version 1, not 2; .* install a newer one"):
        Snapshot.open(copied)


@pytest.mark.parametrize("text", ["{}", "[]", '"x"', '{"format": "other"}', "\xff"])
def test_another_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=MANIFEST):
        Snapshot.open(tmp_path)


def test_what_is_no_snapshot_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(ValueError, match=r"must be a snapshot, but has no manifest\.json"):
            Snapshot.open(path)


# What is asked for and is not there -----------------------------------------------------------------------


def check_locator(store: Store) -> XLocator:
    with soma.Experiment.open(store.uri) as experiment:
        return XLocator.create(experiment, MEASUREMENT)


def test_a_reader_refuses_rows_columns_and_names_that_are_not_there(store: Store, tmp_path: Path) -> None:
    part = make(tmp_path / "part.snapshot", store, slice(10, 20), [3, 5], obs_column_names=["score"])
    with pytest.raises(ValueError, match=r"obs_joinids must be rows .* but 2 of 3 are not, 9 for instance"):
        part.reader(np.array([9, 10, 21]))
    with pytest.raises(
        ValueError, match=r"var_joinids must be columns .* but 1 of 2 are not, 4 for instance"
    ):
        part.reader(None, np.array([3, 4]))
    with pytest.raises(ValueError, match=r"obs_column_names='scor' must be .*; did you mean 'score'"):
        part.reader(None, None, ["scor"])
    with pytest.raises(TypeError, match="obs_column_names='score' must be a list"):
        part.reader(None, None, "score")
    part.reader(np.array([10, 20]), np.array([5]), ["soma_joinid", "score"])


def test_a_snapshot_says_how_it_differs_from_what_is_queried(
    store: Store, make_store: Callable[..., Store], whole: Snapshot, both: Snapshot, tmp_path: Path
) -> None:
    whole.check_holds(check_locator(store), ["score", "soma_joinid"])
    other = make_store(obs_joinids=range(50))
    with pytest.raises(ValueError, match=f"the experiment is '{re.escape(store.uri)}' there, not"):
        whole.check_holds(check_locator(other), ["score"])
    with pytest.raises(ValueError, match="must be made from one query"):
        both.check_holds(check_locator(store), ["cell_type"])
    written = make(tmp_path / "written.snapshot", other)
    add_array(other, "X", "other", np.ones((50, N_VARS), np.float32))
    written.check_holds(check_locator(other), ["soma_joinid"])
    with soma.SparseNDArray.open(f"{other.uri}/ms/{MEASUREMENT}/X/raw", "w") as X:
        write_entries(X, np.array([1]), np.array([1]), np.ones(1, np.float32))
    with pytest.raises(ValueError, match="X/raw was written to since the snapshot was made"):
        written.check_holds(check_locator(other), ["soma_joinid"])
