from __future__ import annotations

from unittest import mock

import pytest
import tiledbsoma as soma

from stores import Store
from tiledbsoma_ml import experiment_dataloader


def test_printing_says_what_a_dataset_yields(store: Store) -> None:
    facts = (
        f"311 rows by 23 columns; source={store.uri!r}, batch_size=16, shuffle_chunk_size=64, "
        "io_batch_size=65,536, shuffle=True, shuffle_scope='partition', seed=3, X=dense, obs=soma_joinid, "
        "rank=0 of 1"
    )
    dataset = store.dataset(batch_size=16, seed=3)
    assert str(dataset) == repr(dataset) == f"<ExperimentDataset: {facts}>"
    loader = experiment_dataloader(dataset)
    assert repr(loader) == f"<ExperimentDataLoader: {facts}, num_workers=0>"
    assert "<td style='text-align:left'>311 rows by 23 columns</td>" in dataset._repr_html_()
    assert "<th style='text-align:left'>num_workers</th>" in loader._repr_html_()


def test_printing_says_what_auto_stands_for_as_soon_as_it_is_known(store: Store) -> None:
    dataset = store.dataset(batch_size=16, shuffle_chunk_size="auto", io_batch_size="auto")
    with mock.patch.object(soma.SparseNDArray, "read", side_effect=AssertionError("X was read")):
        unknown = "auto, which is found out when it is needed"
        assert f"shuffle_chunk_size={unknown}, io_batch_size={unknown}" in repr(dataset)
    list(dataset)
    known = "shuffle_chunk_size=auto: runs of 64 rows, io_batch_size=auto: windows of 311 rows"
    assert known in repr(dataset)


def test_printing_tells_the_sizes_of_this_rank_and_does_without_ranks_that_cannot_be(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = {"shuffle_chunk_size": "auto", "io_batch_size": "auto", "batch_size": 16}
    dataset = store.dataset(ranks=(1, 4), **auto)
    assert dataset.plan.is_auto
    assert "io_batch_size=auto: windows of 77 rows" in repr(dataset)
    alone = store.dataset(**auto)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "rank=unknown" in repr(alone)
    assert alone.plan.is_auto
    assert "rank=unknown" in repr(alone)
