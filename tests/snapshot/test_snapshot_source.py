from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from matrix_source import matrix_source
from stores import N_OBS, joinids_of
from tiledbsoma_ml import ExperimentDataset
from tiledbsoma_ml.snapshot import Snapshot


def test_a_dataset_yields_the_same_from_a_source_and_from_a_snapshot_of_it(path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 20, "shuffle_chunk_size": 8, "io_batch_size": 64, "seed": 3}
    plain = ExperimentDataset(source=matrix_source(), **options)
    stored = ExperimentDataset(source=matrix_source(), snapshot=path, **options)
    joinids = joinids_of(plain)
    assert joinids.tolist() == joinids_of(stored).tolist() != list(range(N_OBS))
    Snapshot.open(path).verify()
    with pytest.raises(ValueError, match=r"content\['version'\] is '1' there, not '2'"):
        ExperimentDataset(source=matrix_source(content={"version": "2"}), snapshot=path, **options)
