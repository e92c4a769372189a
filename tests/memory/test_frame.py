from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from memory_cells import N_OBS, N_VARS, make_table, make_X, read
from tiledbsoma_ml import QueryIDs
from tiledbsoma_ml.memory import MemorySource


def test_columns_of_obs_keep_types_and_categories() -> None:
    source = MemorySource(make_X(), make_table())
    rows = np.array([5, 2, 5])
    names = make_table().columns.tolist()
    expected = make_table().iloc[rows].reset_index(drop=True)
    pd.testing.assert_frame_equal(source.obs(rows, names), expected)
    assert source.obs(rows, ["cell_type"])["cell_type"].cat.categories.tolist()[-1] == "unseen"


@pytest.mark.parametrize(("name", "known"), [("cell_id", "cell_id"), (None, "index"), ("n_genes", "")])
def test_the_index_is_a_column_under_its_name(name: str | None, known: str) -> None:
    obs = make_table()
    obs.index.name = name
    source = MemorySource(make_X(), obs)
    if known:
        assert source.obs(np.array([3, 1]), [known])[known].tolist() == ["cell3", "cell1"]
    else:  # a column has that name
        assert source.obs(np.array([3, 1]), ["n_genes"])["n_genes"].tolist() == [3, 1]


def test_joinids_are_those_of_obs_and_var_or_count_from_0() -> None:
    obs, ids = make_table(), np.arange(N_OBS)[::-1] * 3
    obs["soma_joinid"] = pd.array(ids, dtype="Int64")
    var = pd.DataFrame({"symbol": [f"s{j}" for j in range(N_VARS)]}, index=np.arange(N_VARS) + 7)
    var.index.name = "soma_joinid"
    source = MemorySource(make_X(), obs, var)
    assert source.query_ids == QueryIDs(obs_joinids=ids, var_joinids=np.arange(N_VARS) + 7)
    X, table = read(source, [3, 0], [8], ["n_genes", "soma_joinid"])
    assert table["n_genes"].tolist() == [N_OBS - 2, N_OBS - 1]
    assert table["soma_joinid"].dtype == np.int64
    np.testing.assert_array_equal(X, make_X()[[N_OBS - 2, N_OBS - 1]][:, [1]])
    found = source.var(np.array([9, 8]))
    assert found.columns.tolist() == ["soma_joinid", "symbol"]
    assert found["symbol"].tolist() == ["s2", "s1"]
    plain = MemorySource(make_X(), make_table())
    assert plain.query_ids == QueryIDs(obs_joinids=np.arange(N_OBS), var_joinids=np.arange(N_VARS))
    assert plain.var(np.array([4])).columns.tolist() == ["soma_joinid"]


def test_what_is_added_to_obs_later_is_not_seen() -> None:
    obs = make_table()
    source = MemorySource(make_X(), obs)
    obs["later"] = 1
    with pytest.raises(ValueError, match="must be a column of obs"):
        source.obs(np.array([0]), ["later"])
