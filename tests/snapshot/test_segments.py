from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledbsoma as soma

from matrix_source import MatrixSource, matrix_source
from snapshots import make
from stores import MEASUREMENT, N_VARS, Store, expected_X, make_obs
from tiledbsoma_ml import QueryIDs
from tiledbsoma_ml.snapshot import Snapshot


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


# Several --------------------------------------------------------------------------------------------------


def test_rows_of_several_sources_follow_each_other(path: Path) -> None:
    sources = [matrix_source(100), matrix_source(0), matrix_source(30, content={"version": "2"})]
    snapshot = make(path, sources, obs_column_names=["cell_type", "maybe_text"])
    joinids = [*range(100), *range(30)]
    assert snapshot.obs_joinids.tolist() == joinids
    np.testing.assert_array_equal(snapshot[:][0].toarray(), expected_X(joinids, range(N_VARS)))
    assert snapshot.obs["soma_source"].tolist() == 100 * [0] + 30 * [2]
    assert snapshot.obs["cell_type"].tolist() == make_obs(np.array(joinids))["cell_type"].tolist()
    snapshot.verify()
    with pytest.raises(ValueError, match="must be made from one query to be read as part of one"):
        snapshot.check_holds(sources[0], ["cell_type"])


def test_categories_of_several_sources_are_put_together_however_many_there_are(path: Path) -> None:
    few, many = (pd.Categorical([f"{name}{k}" for k in range(n)]) for name, n in (("a", 5), ("b", 300)))
    sources = [MatrixSource(np.eye(len(c), 3), pd.DataFrame({"batch": c})) for c in (few, many)]
    obs = make(path, sources, obs_column_names=["batch"]).obs
    assert obs["batch"].tolist() == [*few, *many]
    assert len(obs["batch"].cat.categories) == 305


def test_features_of_several_sources_are_the_same_if_one_column_that_names_them_is(path: Path) -> None:
    ids, n_cells = [f"ENSG{j}" for j in range(N_VARS)], [f"{j} cells" for j in range(N_VARS)]
    features = [pd.DataFrame({"index": ids, "note": some}) for some in (n_cells, n_cells[::-1])]
    snapshot = make(path, [matrix_source(3, features=some) for some in features])
    assert snapshot.var["note"].tolist() == n_cells


def test_sources_that_do_not_fit_together_are_refused(path: Path, store: Store) -> None:
    first, fewer = matrix_source(3), matrix_source(3)
    fewer.query_ids = QueryIDs(obs_joinids=range(3), var_joinids=[0, 1])
    with pytest.raises(
        ValueError, match=r"on the same columns, but that on 'source:MatrixSource' has 2 other"
    ):
        make(path, [first, fewer])
    doubles = MatrixSource(np.eye(4, N_VARS), make_obs(np.arange(4)))
    with pytest.raises(ValueError, match=r"layer 'X' must have one type in all queries, but has <f4 in"):
        make(path, [first, doubles])
    texts = matrix_source(3)
    texts.frame = texts.frame.assign(score=["a", "b", "c"])
    with pytest.raises(ValueError, match="obs_column_names must have one type in all queries, but"):
        make(path, [first, texts], obs_column_names=["score"])
    names = [[f"g{j}" for j in range(N_VARS)], [f"g{j + (j == 4)}" for j in range(N_VARS)]]
    for column in ("feature_id", "index"):
        named = [matrix_source(3, features=pd.DataFrame({column: some})) for some in names]
        with pytest.raises(ValueError, match="has 'g5' where the first has 'g4'"):
            make(path, named)
    with store.query() as query, pytest.raises(TypeError, match="must hold queries or sources, not some of"):
        make(path, [query, first])
    assert not path.exists()


# What is not right ----------------------------------------------------------------------------------------


class NoSource:
    """What has some of what a source has."""

    query_ids = QueryIDs(obs_joinids=[0], var_joinids=[0])
    row_tile = 1
    layout = open = obs = check = prepare = None


def test_what_is_neither_a_query_nor_a_source_is_refused(path: Path, whole: Snapshot) -> None:
    for other in (5, whole, MatrixSource, "x.h5ad"):
        kind = type(other).__name__
        with pytest.raises(
            TypeError, match=f"query must be an ExperimentAxisQuery, not of type {kind}; .* Source"
        ):
            make(path, other)
    with pytest.raises(
        TypeError,
        match=r"source=NoSource must have all members .* but lacks .*content.*var",
    ):
        make(path, NoSource())
