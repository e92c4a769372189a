from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pairs import all_ids, pair
from stores import Store, joinids_of
from tiledbsoma_ml import Snapshot
from tiledbsoma_ml.snapshot.reader import RowIndex


@pytest.mark.parametrize("scope", ["partition", "global"])
def test_in_an_epoch_rows_are_looked_up_once_a_mini_batch_at_a_time(
    store: Store, whole: Snapshot, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, dataset = pair(store, whole, all_ids(), batch_size=50, shuffle_scope=scope)
    sizes, find = [], RowIndex.find
    monkeypatch.setattr(RowIndex, "find", lambda self, ids: sizes.append(len(ids)) or find(self, ids))
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(id=1, num_workers=2))
    n_rows = len(joinids_of(dataset))
    assert max(sizes) == 50
    assert sum(sizes) == 2 * n_rows, "once for X, once for obs"
