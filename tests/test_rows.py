from __future__ import annotations

import pickle
from typing import Any

import attrs
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from stores import N_VARS, expected_X, make_obs
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml._rows import MANY_CATEGORIES, Padding, Rows, concat_obs


def as_matrix(dense: np.ndarray) -> CSR_IO_Buffer:
    csr = sparse.csr_matrix(dense)
    return CSR_IO_Buffer.from_pjd(csr.indptr, csr.indices, csr.data, csr.shape)


def rows_of(joinids: Any) -> Rows[CSR_IO_Buffer]:
    """Return rows in which everything that belongs to a row tells its joinid."""
    joinids = np.asarray(joinids, dtype=np.int64)
    X = expected_X(joinids, range(N_VARS))
    return Rows(
        obs_joinids=joinids,
        X=as_matrix(X),
        obs=make_obs(joinids),
        layers={"doubled": as_matrix(2 * X)},
        obsm={"X_pca": joinids[:, np.newaxis] * np.array([1.0, -1.0])},
    )


def assert_rows(found: Rows[Any], joinids: Any) -> None:
    """Assert that rows are those of joinids, in every part."""
    expected = rows_of(joinids)
    assert len(found) == len(expected)
    assert found.obs_joinids.tolist() == expected.obs_joinids.tolist()
    for matrix, wanted in [(found.X, expected.X), (found.layers["doubled"], expected.layers["doubled"])]:
        dense = matrix.slice_tonumpy(slice(None)) if isinstance(matrix, CSR_IO_Buffer) else matrix.to_dense()
        np.testing.assert_array_equal(dense, wanted.slice_tonumpy(slice(None)))
    pd.testing.assert_frame_equal(found.obs.reset_index(drop=True), expected.obs)
    np.testing.assert_array_equal(found.obsm["X_pca"], expected.obsm["X_pca"])


@pytest.mark.parametrize("device", [None, "cpu"])
@given(data=st.data())
@settings(max_examples=50)
def test_every_part_of_rows_is_cut_taken_and_put_together_alike(
    device: str | None, data: st.DataObject
) -> None:
    joinids = np.array(data.draw(st.lists(st.integers(0, 500), max_size=12)), dtype=np.int64)
    rows: Rows[Any] = rows_of(joinids)
    rows = rows if device is None else rows.to(torch.device(device))
    assert_rows(rows, joinids)
    start, stop = sorted(data.draw(st.lists(st.integers(0, len(rows)), min_size=2, max_size=2)))
    assert_rows(rows.slice(start, stop), joinids[start:stop])
    numbers = st.lists(st.integers(0, max(len(rows) - 1, 0)), max_size=9 if len(rows) else 0)
    taken = np.array(data.draw(numbers), dtype=np.int64)
    assert_rows(rows.take(taken), joinids[taken])
    parts = [rows.slice(0, start), rows.slice(start, stop), rows.take(taken), rows.slice(stop, len(rows))]
    order = [joinids[:start], joinids[start:stop], joinids[taken], joinids[stop:]]
    assert_rows(Rows.concat(parts), np.concatenate(order))


def test_rows_survive_pickling() -> None:
    assert_rows(pickle.loads(pickle.dumps(rows_of([5, 2, 9]))), [5, 2, 9])


@pytest.mark.parametrize("part", ["obs", "X", "layers", "obsm"])
def test_parts_of_other_lengths_are_no_rows(part: str) -> None:
    with pytest.raises(AssertionError):
        attrs.evolve(rows_of([1, 2, 3]), **{part: getattr(rows_of([1, 2]), part)})


def test_padding_marks_the_rows_of_its_joinids_in_a_column_of_its_name() -> None:
    obs = make_obs(np.array([4, 7, 4, 1]))
    marked = Padding(column_name="again", obs_joinids=np.array([4, 9])).mark(obs, np.array([4, 7, 4, 1]))
    assert marked["again"].tolist() == [True, False, True, False]
    pd.testing.assert_frame_equal(marked.drop(columns="again"), obs)
    assert "again" not in obs
    assert Padding(column_name=None, obs_joinids=np.array([4])).mark(obs, np.array([4, 7, 4, 1])) is obs


# obs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_categories_stay_the_same_where_a_mini_batch_is_made_of_several_pieces(
    shared: bool, ordered: bool
) -> None:
    names = [f"label{k}" for k in range(MANY_CATEGORIES + 1)]
    dtype = pd.CategoricalDtype(names, ordered=ordered)
    pieces = [
        pd.DataFrame({"label": pd.Categorical.from_codes(codes, dtype=dtype), "n": codes})
        for codes in ([0, 2, -1], [1, 0])
    ]
    if not shared:  # as from another process
        pieces[1] = pickle.loads(pickle.dumps(pieces[1]))
    whole = concat_obs(pieces)
    pd.testing.assert_frame_equal(whole, pd.concat(pieces, ignore_index=True))
    assert whole["label"].dtype.categories is dtype.categories


def test_pieces_of_other_categories_are_put_together_as_pandas_does() -> None:
    names = [f"label{k}" for k in range(MANY_CATEGORIES + 1)]
    others = [names, names[::-1], names[:-1]]
    pieces = [pd.DataFrame({"label": pd.Categorical(names[5:6], categories=known)}) for known in others]
    pd.testing.assert_frame_equal(concat_obs(pieces), pd.concat(pieces, ignore_index=True))
