"""Who gets what: rows of both scopes, over ranks and workers, dropped or repeated at the end."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import pytest

from epochs import SCOPES, TAILS, Place, at, batches_of, dataset_of, epoch_of_rank
from stores import Store
from tiledbsoma_ml import Snapshot, experiment_dataloader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* changes nothing here: "),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


@pytest.mark.parametrize(
    ("world_size", "n_workers", "scope", "tail"), list(product((1, 2, 4), (0, 1, 3), SCOPES, TAILS))
)
def test_every_row_comes_once_in_equal_batches_of_known_number(
    whole: Snapshot, world_size: int, n_workers: int, scope: Any, tail: Any
) -> None:
    n_rows = 203
    dataset = dataset_of(whole, n_rows, shuffle_scope=scope, tail=tail)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        of_ranks = [epoch_of_rank(dataset, rank, world_size, n_workers) for rank in range(world_size)]
        lengths = [[len(batch) for batch in batches] for batches in of_ranks]
        assert all(one == lengths[0] for one in lengths)
        loader = experiment_dataloader(dataset, num_workers=n_workers)
        with at(Place(0, world_size, 0, 0)):
            assert len(loader) == len(lengths[0])
        rows = [row for batches in of_ranks for batch in batches for row in batch]
        if tail == "drop":
            assert len(set(rows)) == len(rows) == n_rows // world_size * world_size
        else:
            assert set(rows) == set(range(n_rows))
            assert len(rows) == -(-n_rows // world_size) * world_size


@pytest.mark.parametrize("mode", ["cpu", "gpu_iobatch", "gpu_minibatch"])
@pytest.mark.parametrize("tail", TAILS)
def test_in_global_scope_the_mini_batches_of_a_rank_do_not_depend_on_its_workers(
    whole: Snapshot, mode: str, tail: Any
) -> None:
    device = None if mode == "cpu" else "cpu"
    options = {"shuffle_mode": mode, "device": device, "tail": tail, "batch_size": 7}
    dataset = dataset_of(whole, 150, shuffle_scope="global", **options)
    dataset.ranks = (1, 2)
    if mode == "cpu":
        expected = sorted(epoch_of_rank(dataset, 1, 2, 0))
        for n_workers in (1, 2, 3):
            found = epoch_of_rank(dataset, 1, 2, n_workers)
            assert sorted(found) == expected
            assert sum(len(batch) < 7 for batch in found) <= 1
    else:
        dataset.ranks = None
        with mock.patch.dict("os.environ", {"RANK": "1", "WORLD_SIZE": "2"}):
            expected = sorted(batches_of(copy.deepcopy(dataset)))
            context = {"num_workers": 2, "multiprocessing_context": "fork"}
            assert sorted(batches_of(experiment_dataloader(dataset, **context))) == expected


def test_in_global_scope_every_rank_sees_all_of_the_query_and_other_rows_in_every_epoch(
    whole: Snapshot,
) -> None:
    dataset = dataset_of(whole, 300, shuffle_scope="global")
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        rows = np.concatenate(epoch_of_rank(dataset, 0, 2, 0))
        assert min((rows < 100).sum(), (rows >= 200).sum()) > 20
        epochs.append(set(rows.tolist()))
    assert len(epochs[0] & epochs[1]) < 100


def test_in_global_scope_other_rows_are_dropped_in_every_epoch(whole: Snapshot) -> None:
    dataset = dataset_of(whole, 203, shuffle_scope="global")
    dropped = set()
    for epoch in range(5):
        dataset.set_epoch(epoch)
        rows = [row for rank in range(4) for batch in epoch_of_rank(dataset, rank, 4, 0) for row in batch]
        dropped |= set(range(203)) - set(rows)
    assert len(dropped) > 3


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("source", ["experiment", "snapshot", "device"])
def test_without_the_rows_marked_as_padding_every_row_comes_once(
    store: Store, whole: Snapshot, scope: Any, source: str
) -> None:
    options = {
        "tail": "pad",
        "padding_column_name": "is_padding",
        "shuffle_scope": scope,
        "batch_size": 8,
        "seed": 1,
    }
    options |= {"io_batch_size": 64, "shuffle_chunk_size": 4}
    if source == "experiment":
        dataset = store.dataset(range(101), **options)
    else:
        device = {"shuffle_mode": "gpu", "device": "cpu"} if source == "device" else {}
        dataset = dataset_of(whole, 101, **options, **device)
    rows, n_padding = [], 0
    for rank in range(4):
        with at(Place(rank, 4, 0, 0)):
            for _, obs in copy.deepcopy(dataset):
                assert obs["is_padding"].dtype == bool
                rows += obs["soma_joinid"][~obs["is_padding"]].tolist()
                n_padding += obs["is_padding"].sum()
    assert sorted(rows) == list(range(101))
    assert n_padding == 3


def test_a_column_that_marks_padding_needs_padding_and_a_name_of_its_own(whole: Snapshot) -> None:
    with pytest.raises(ValueError, match=r"padding_column_name='p' needs rows .* add tail='pad'"):
        dataset_of(whole, padding_column_name="p")
    with pytest.raises(ValueError, match="must not be one of obs_column_names"):
        dataset_of(whole, tail="pad", padding_column_name="soma_joinid")


@pytest.mark.parametrize("name", ["shuffle_scope", "tail"])
def test_an_unknown_word_is_refused_with_those_that_are_known(whole: Snapshot, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}='all' must be '.*' or '.*'; try"):
        dataset_of(whole, **{name: "all"})


def test_more_ranks_than_rows_are_refused_unless_rows_are_repeated(whole: Snapshot) -> None:
    with at(Place(0, 4, 0, 0)):
        with pytest.raises(ValueError, match="4 ranks must each get a row, but the query has 3"):
            next(iter(dataset_of(whole, 3)))
        assert len(batches_of(dataset_of(whole, 3, tail="pad"))) == 1


@pytest.mark.parametrize("scope", SCOPES)
def test_more_workers_than_rows_are_left_without(whole: Snapshot, scope: Any) -> None:
    dataset = dataset_of(whole, 2, shuffle_scope=scope, batch_size=1)
    assert sorted(epoch_of_rank(dataset, 0, 1, 4)) == [[0], [1]]
