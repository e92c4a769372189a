"""What `X` declares and what is written to it are two things: joinids decide what a reader gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma as soma

from stores import MEASUREMENT, N_OBS, N_VARS, Store, expected_X, joinids_of
from tiledbsoma_ml import ExperimentDataset, Snapshot

UNLIMITED = 2**62
"""No table of so many entries can be made: whatever is sized by this shape fails."""

MODES: dict[str, dict[str, Any]] = {
    "shuffled": {"shuffle_chunk_size": 16, "io_batch_size": 64},
    "in order": {"shuffle": False},
    "auto": {"shuffle_chunk_size": "auto", "io_batch_size": "auto"},
    "global": {"shuffle_scope": "global"},
    "on a device": {"shuffle_mode": "gpu_iobatch", "device": "cpu"},
    "sparse": {"return_sparse_X": True},
    "from a snapshot": {"snapshot": True},
}


@pytest.fixture(scope="module")
def unlimited(make_store: Callable[..., Store]) -> Store:
    """`X` is declared as experiments of tiledbsoma.io up to 1.14 are; its rows lie in one tile."""
    store = make_store(X_shape=(UNLIMITED, UNLIMITED), tile=(2**31, 8))
    add_embedding(store, "pca", 3 * [1.5])
    add_embedding(store, "nothing", [])
    return store


@pytest.fixture(scope="module")
def short(make_store: Callable[..., Store]) -> Store:
    """`X` lacks the last rows of `obs` and the last columns of `var`."""
    return make_store(X_shape=(200, 17))


@pytest.fixture(scope="module")
def short_and_dense(make_store: Callable[..., Store]) -> Store:
    return make_store(X_shape=(200, 17), dense=True)


def add_embedding(store: Store, name: str, row: list[float]) -> None:
    with soma.Experiment.open(store.uri, "w") as experiment:
        measurement = experiment.ms[MEASUREMENT]
        obsm = measurement["obsm"] if "obsm" in measurement else measurement.add_new_collection("obsm")
        array = obsm.add_new_sparse_ndarray(name, type=pa.float32(), shape=(UNLIMITED, UNLIMITED))
        i, j = np.divmod(np.arange(N_OBS * len(row)), max(1, len(row)))
        values = np.tile(np.array(row, dtype=np.float32), N_OBS)
        array.write(pa.table({"soma_dim_0": i, "soma_dim_1": j, "soma_data": values}))


def dataset_of(store: Store, tmp_path: Path, mode: str, **options: Any) -> ExperimentDataset:
    options |= MODES[mode]
    if "snapshot" in options:
        options["snapshot"] = tmp_path / "made.snapshot"
    return store.dataset(batch_size=50, memory_budget="64MiB", **options)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_is_declared_without_a_limit_is_read_like_any_other(
    unlimited: Store, tmp_path: Path, mode: str
) -> None:
    assert sorted(joinids_of(dataset_of(unlimited, tmp_path, mode))) == list(range(N_OBS))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("short", mode) for mode in MODES] + [("short_and_dense", mode) for mode in MODES if mode != "auto"],
)
def test_rows_and_columns_that_x_lacks_are_zero_in_every_mode(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, mode: str
) -> None:
    seen = []
    for X, obs in dataset_of(request.getfixturevalue(kind), tmp_path, mode):
        ids = obs["soma_joinid"].to_numpy()
        expected = expected_X(ids, range(N_VARS))
        expected[ids >= 200] = expected[:, 17:] = 0
        np.testing.assert_array_equal(X.toarray() if mode == "sparse" else np.asarray(X), expected)
        seen += ids.tolist()
    assert sorted(seen) == list(range(N_OBS))


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_query_of_nothing_but_rows_that_x_lacks_is_zero(short: Store, shuffle: bool) -> None:
    for X, _ in short.dataset(range(250, 300), batch_size=50, shuffle=shuffle):
        assert not X.any()


def test_an_embedding_that_is_declared_without_a_limit_has_the_columns_that_are_written(
    unlimited: Store, tmp_path: Path
) -> None:
    with unlimited.query() as query:
        snapshot = Snapshot.create(tmp_path / "with.snapshot", query, obsm=["pca"])
        np.testing.assert_array_equal(snapshot.obsm["pca"], np.full((N_OBS, 3), 1.5))


def test_an_embedding_without_a_limit_and_without_values_is_refused(unlimited: Store, tmp_path: Path) -> None:
    with (
        unlimited.query() as query,
        pytest.raises(
            ValueError, match=r"obsm='nothing' must have at most 1,048,576 columns, but is declared"
        ),
    ):
        Snapshot.create(tmp_path / "with.snapshot", query, obsm=["nothing"])
