from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from plain_source import N_OBS, Plain, PlainReader
from tiledbsoma_ml import ExperimentDataset


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("scope", ["partition", "global"])
def test_in_an_epoch_a_worker_asks_for_its_rows_once_a_mini_batch_at_a_time(
    scope: Any, is_sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[int]] = {"X": [], "obs": []}

    class Asked(PlainReader):
        def csr(self, ids: Any) -> Any:
            asked["X"] += ids.tolist()
            assert len(ids) <= 15
            return super().csr(ids)

        def fill_dense(self, ids: Any, out: Any) -> None:
            asked["X"] += ids.tolist()
            assert len(ids) <= 15
            super().fill_dense(ids, out)

        def obs(self, ids: Any) -> Any:
            asked["obs"] += ids.tolist()
            return super().obs(ids)

    source = Plain()
    source.reader = Asked
    options = {"batch_size": 15, "shuffle_scope": scope, "return_sparse_X": is_sparse, "seed": 1}
    dataset = ExperimentDataset(source=source, **options)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(id=1, num_workers=2))
    found = [row for _, obs in dataset for row in obs["soma_joinid"]]
    assert 0 < len(found) < N_OBS
    assert len(set(found)) == len(found)
    assert sorted(asked["X"]) == sorted(asked["obs"]) == sorted(found)
