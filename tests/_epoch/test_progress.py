from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from epochs import batches_of, dataset_of, loader_of, place_of
from tiledbsoma_ml import Snapshot, experiment_dataloader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* changes nothing here: "),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_look_by_another_loader_moves_neither_the_position_nor_the_order(
    whole: Snapshot, n_workers: int
) -> None:
    expected = batches_of(loader_of(whole, n_workers))
    loader = loader_of(whole, n_workers)
    look = experiment_dataloader(loader.dataset)
    next(iter(look))
    iterator = iter(loader)
    found = [next(iterator)[1]["soma_joinid"].tolist() for _ in range(5)]
    next(iter(look))
    assert (place_of(loader), place_of(look)) == ((0, 5), (1, 1))
    assert found == expected[:5]
    later = experiment_dataloader(loader.dataset)
    assert place_of(later) == (2, 0)  # a loader that is made now goes on from what there was


@pytest.mark.parametrize("copied_by", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_dataset_moves_by_itself(whole: Snapshot, copied_by: Callable[[Any], Any]) -> None:
    dataset = dataset_of(whole)
    batches_of(dataset)
    copied = copied_by(dataset)
    assert place_of(copied) == place_of(dataset) == (1, 0)
    iterator = iter(dataset)
    ahead = [next(iterator)[1]["soma_joinid"].tolist() for _ in range(3)]
    assert place_of(copied) == (1, 0)
    assert batches_of(copied)[:3] == ahead
    copied.load_state_dict(dict(copied.state_dict(), epoch=7))
    assert (place_of(copied), place_of(dataset)) == ((7, 0), (1, 3))
    copied.set_epoch(9)
    assert (copied.epoch, dataset.epoch) == (9, 1)


def test_an_iterator_that_is_not_the_newest_does_not_move_the_position(whole: Snapshot) -> None:
    for stateful in (dataset_of(whole), loader_of(whole, 0)):
        old = iter(stateful)
        next(old)
        new = iter(stateful)
        for _ in range(4):
            next(new)
        next(old)
        assert place_of(stateful) == (1, 4)
        del old
        assert place_of(stateful) == (1, 4)


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_look_at_one_mini_batch_does_not_use_a_loaded_state_up(whole: Snapshot, n_workers: int) -> None:
    loader = loader_of(whole, n_workers)
    expected = batches_of(loader)
    loader = loader_of(whole, n_workers)
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    state = loader.state_dict()
    resumed = loader_of(whole, n_workers)
    resumed.load_state_dict(state)
    for _ in range(2):
        assert next(iter(resumed))[1]["soma_joinid"].tolist() == expected[5]
        assert resumed.state_dict() == state
    assert batches_of(resumed) == expected[5:]
    assert place_of(resumed) == (1, 0)


def test_a_loop_that_takes_one_mini_batch_of_a_new_iterator_at_a_time_goes_on_after_a_resume(
    whole: Snapshot,
) -> None:
    loader = loader_of(whole, 0)
    loader.load_state_dict({**loader.state_dict(), "n_yielded": 3})
    found = [tuple(next(iter(loader))[1]["soma_joinid"]) for _ in range(8)]
    assert len(set(found)) > 3


def test_the_last_mini_batch_of_an_epoch_uses_a_loaded_state_up(whole: Snapshot) -> None:
    loader = loader_of(whole, 0)
    loader.load_state_dict({**loader.state_dict(), "n_yielded": len(loader) - 1})
    next(iter(loader))
    assert place_of(loader) == (1, 0)
    next(iter(loader))
    assert place_of(loader) == (1, 1)


def test_a_state_is_of_no_use_once_another_epoch_was_set(whole: Snapshot) -> None:
    dataset = dataset_of(whole)
    expected = batches_of(dataset)
    loader = experiment_dataloader(dataset)
    for resumed in dataset, loader:
        resumed.load_state_dict({**dataset.state_dict(), "epoch": 0, "n_yielded": 4})
        dataset.set_epoch(2)
        dataset.set_epoch(0)
        assert batches_of(resumed) == expected


def test_a_state_that_a_dataset_has_used_counts_for_its_loader_again(whole: Snapshot) -> None:
    dataset = dataset_of(whole)
    iterator = iter(dataset)
    next(iterator)
    state = dataset.state_dict()
    rest = [obs["soma_joinid"].tolist() for _, obs in iterator]
    dataset.load_state_dict(state)
    assert batches_of(dataset) == rest
    loader = experiment_dataloader(dataset)
    loader.load_state_dict(state)
    assert batches_of(loader) == rest
    dataset.load_state_dict(state)
    dataset.set_epoch(5)
    loader.load_state_dict(state)
    assert batches_of(loader) == rest


@pytest.mark.parametrize("persistent", [False, True])
def test_the_state_of_a_dataset_is_that_of_its_loader_with_workers(whole: Snapshot, persistent: bool) -> None:
    options = {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": persistent}
    loader = experiment_dataloader(dataset_of(whole, 130), **options)
    expected = batches_of(loader)
    loader.dataset.set_epoch(0)
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    state = loader.dataset.state_dict()
    assert state == loader.state_dict()
    resumed = experiment_dataloader(dataset_of(whole, 130), **options)
    resumed.dataset.load_state_dict(state)
    assert batches_of(resumed) == expected[5:]
    assert place_of(resumed.dataset) == (1, 0)


def test_only_workers_know_the_position_where_a_plain_loader_has_some(whole: Snapshot) -> None:
    dataset = dataset_of(whole, 60)
    options = {"num_workers": 1, "multiprocessing_context": "fork", "collate_fn": lambda batch: batch}
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, **options)
    first, second = batches_of(loader), batches_of(loader)
    assert first != second
    assert dataset.epoch == 1
    with pytest.raises(RuntimeError, match=r"must be that of the loader .* take experiment_dataloader or"):
        dataset.state_dict()
    dataset.set_epoch(1)
    assert place_of(dataset) == (1, 0)
    dataset.load_state_dict({**dataset.state_dict(), "n_yielded": 3})
    assert batches_of(loader) == second[3:]
    assert batches_of(loader) not in (second[3:], second)  # a state is taken once, not by each copy
