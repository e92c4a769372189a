from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stores import N_VARS, Store, joinids_of
from tiledbsoma_ml import ExperimentDataset, QueryIDs


def test_a_snapshot_whose_experiment_cannot_be_listed_is_used_with_a_warning(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlisted(_: object) -> None:
        raise OSError

    ids = QueryIDs(obs_joinids=np.arange(20), var_joinids=np.arange(N_VARS))
    known = {"x_locator": store.locator, "query_ids": ids, "snapshot": tmp_path / "x.snapshot"}
    next(iter(ExperimentDataset(**known)))
    monkeypatch.setattr("tiledbsoma_ml._soma.versions.open_vfs", unlisted)
    with pytest.warns(UserWarning, match=r"holds .* as of 20.*; whether obs, var, X/raw changed since"):
        dataset = ExperimentDataset(**known)
    assert len(joinids_of(dataset)) == 20
