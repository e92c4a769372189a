from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshots import ALL_OBS, make, read_soma
from stores import N_OBS, N_VARS, Store, expected_X
from tiledbsoma_ml._rows import Rows
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.snapshot.reader import READ_ROWS

# The same rows as from SOMA -------------------------------------------------------------------------------


@given(
    rows=st.lists(st.integers(0, N_OBS - 1), min_size=1, max_size=60),
    columns=st.lists(st.integers(0, N_VARS - 1), unique=True, max_size=N_VARS),
    names=st.lists(st.sampled_from([*ALL_OBS, "soma_joinid"]), unique=True, min_size=1, max_size=4),
)
def test_rows_columns_and_obs_are_those_of_the_experiment_in_the_order_asked_for(
    store: Store, either: Snapshot, rows: list[int], columns: list[int], names: list[str]
) -> None:
    X, obs = read_soma(store, rows, columns, names)
    dense = X.slice_tonumpy(slice(None))
    ids, var_joinids = np.array(rows), np.array(columns, dtype=np.int64)
    reader = either.reader(ids, var_joinids, names)

    read = reader.rows(ids)
    found, found_obs = read.X, read.obs
    assert read.obs_joinids.tolist() == rows
    pd.testing.assert_frame_equal(found_obs, obs)
    assert (found.dtype, found.indices.dtype, found.shape) == (X.dtype, X.narrowed().indices.dtype, X.shape)
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


def test_a_reader_gives_out_many_rows_in_several_pieces(whole: Snapshot) -> None:
    rows = np.random.default_rng(0).integers(0, N_OBS, 2 * READ_ROWS + 11)
    pieces = list(whole.reader(None, None, ["soma_joinid"]).read(rows))
    assert [len(piece) for piece in pieces] == [READ_ROWS, READ_ROWS, 11]
    found = Rows.concat(pieces)
    assert found.obs["soma_joinid"].tolist() == found.obs_joinids.tolist() == rows.tolist()
    np.testing.assert_array_equal(found.X.slice_tonumpy(slice(None)), expected_X(rows, range(N_VARS)))


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


def test_threads_may_read_from_one_reader_at_once(either: Snapshot) -> None:
    reader = either.reader(None, None, ["soma_joinid"])

    def read(seed: int) -> None:
        rows = np.random.default_rng(seed).integers(0, N_OBS, 10_000)  # which memory is kept for
        X, found = reader.csr(rows), reader.rows(rows)
        expected = expected_X(rows, range(N_VARS))
        np.testing.assert_array_equal(X.toarray(), expected)
        np.testing.assert_array_equal(found.X.slice_tonumpy(slice(None)), expected)
        assert found.obs["soma_joinid"].tolist() == rows.tolist()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(24)))


# What is asked for and is not there -----------------------------------------------------------------------


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
