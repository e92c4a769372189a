from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiledbsoma as soma

from matrix_source import MatrixSource, matrix_source
from snapshots import add_array, make, write_entries
from stores import MEASUREMENT, N_VARS, Store, expected_X, make_obs
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.x_locator import XLocator


def check_locator(store: Store) -> XLocator:
    with soma.Experiment.open(store.uri) as experiment:
        return XLocator.create(experiment, MEASUREMENT)


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


# Once, and killed -----------------------------------------------------------------------------------------


def test_a_snapshot_of_other_content_is_not_used_and_not_overwritten(path: Path) -> None:
    snapshot = make(path, matrix_source())
    snapshot.check_holds(matrix_source(), ["soma_joinid"])
    for content, difference in (
        ({"version": "2"}, r"content\['version'\] is '1' there, not '2'"),
        ({"version": "1", "file": "a"}, r"content\['file'\] is None there, not 'a'"),
        ({}, r"content\['version'\] is '1' there, not None"),
    ):
        with pytest.raises(ValueError, match=f"holds another one .*{difference}.*; choose another path"):
            make(path, matrix_source(content=content))
        with pytest.raises(ValueError, match=f"made from the source that is given, but {difference}"):
            snapshot.check_holds(matrix_source(content=content), ["soma_joinid"])
    with pytest.raises(ValueError, match=r"obs_column_names='score' must be a column of obs"):
        snapshot.check_holds(matrix_source(), ["score"])
    assert Snapshot.open(path).fingerprint == snapshot.fingerprint


def test_another_kind_of_source_and_an_experiment_are_told(path: Path, store: Store) -> None:
    class Other(MatrixSource):
        pass

    snapshot = make(path, matrix_source())
    with pytest.raises(ValueError, match="the source is 'source:MatrixSource' there, not 'source:Other'"):
        snapshot.check_holds(Other(expected_X([0], range(N_VARS)), make_obs(np.arange(1))), ["soma_joinid"])
    with pytest.raises(ValueError, match="the experiment is 'source:MatrixSource' there, not"):
        snapshot.check_holds(store.locator, ["soma_joinid"])


def test_a_source_that_does_not_tell_its_content_is_used_with_a_warning(path: Path) -> None:
    snapshot = make(path, matrix_source(content={}))
    message = "holds 'source:MatrixSource'; whether that changed since cannot be told, because its `content`"
    with pytest.warns(UserWarning, match=message):
        make(path, matrix_source(content={}))
    with pytest.warns(UserWarning, match=message):
        snapshot.check_holds(matrix_source(content={}), ["soma_joinid"])
