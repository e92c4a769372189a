"""An epoch that is left goes on as if nothing had been; and everyone gets their own rows."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
from torchdata.stateful_dataloader import StatefulDataLoader

from epochs import batches_of, dataset_of
from stores import N_OBS, Store, joinids_of
from tiledbsoma_ml import ExperimentDataset, Snapshot
from windows import dataset_of as windowed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* changes nothing here: "),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata calls it
]


# Resuming -------------------------------------------------------------------------------------------------


OPTIONS: dict[str, dict[str, Any]] = {
    "partition": {},
    "global": {"shuffle_scope": "global"},
    "single rows": {"shuffle_chunk_size": 1, "io_batch_size": 30},
    "auto": {"shuffle_chunk_size": "auto", "io_batch_size": "auto"},
    "unshuffled": {"shuffle": False},
    "lazy": {"use_eager_fetch": False},
    "device": {"shuffle_mode": "gpu_iobatch", "device": "cpu"},
    "device, global": {"shuffle_mode": "gpu_iobatch", "device": "cpu", "shuffle_scope": "global"},
    "device, mini-batches": {"shuffle_mode": "gpu_minibatch", "device": "cpu"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_resuming_at_every_mini_batch_gives_the_very_sequence(
    whole: Snapshot, options: dict[str, Any]
) -> None:
    def fresh() -> ExperimentDataset:
        return dataset_of(whole, 100, **options)

    dataset = fresh()
    expected = [batches_of(dataset) for _ in range(3)]
    uninterrupted = [batch for epoch in expected for batch in epoch]
    dataset, n_yielded = fresh(), 0
    for _ in range(2):
        for _ in dataset:
            n_yielded += 1
            state = json.loads(json.dumps(dataset.state_dict()))
            resumed = fresh()
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            rest = batches_of(resumed)
            if n_yielded % len(expected[0]):
                rest += batches_of(resumed)
            assert rest == uninterrupted[n_yielded : n_yielded + len(rest)]


def test_resuming_from_soma_reads_nothing_of_what_came_before(store: Store) -> None:
    sizes = {"shuffle_chunk_size": 4, "io_batch_size": 40, "batch_size": 10}

    def fresh() -> ExperimentDataset:
        return windowed(store, range(N_OBS), return_sparse_X=False, seed=2, **sizes)

    expected = batches_of(fresh())
    for n_yielded in (1, 4, 7, 20, len(expected) - 1):
        dataset = fresh()
        iterator = iter(dataset)
        for _ in range(n_yielded):
            next(iterator)
        state = dataset.state_dict()
        iterator.close()
        resumed = fresh()
        resumed.load_state_dict(state)
        assert batches_of(resumed) == expected[n_yielded:]
        asked = np.concatenate(resumed.source.asked)
        assert sorted(asked) == sorted(np.concatenate(expected[n_yielded:]).tolist())


def test_a_state_is_taken_up_twice_in_a_row(whole: Snapshot) -> None:
    expected = batches_of(dataset_of(whole))
    rest, state = [], None
    for n_batches in (3, 5, 1):
        dataset = dataset_of(whole)
        if state is not None:
            dataset.load_state_dict(state)
        iterator = iter(dataset)
        rest += [next(iterator)[1]["soma_joinid"].tolist() for _ in range(n_batches)]
        state = dataset.state_dict()
    assert rest == expected[:9]


def test_a_state_is_a_new_small_dictionary_of_the_mini_batch_that_was_yielded(whole: Snapshot) -> None:
    dataset = dataset_of(whole)
    iterator = iter(dataset)
    next(iterator)
    first = dataset.state_dict()
    kept = copy.deepcopy(first)
    next(iterator)
    second = dataset.state_dict()
    assert first == kept
    assert (first["n_yielded"], second["n_yielded"]) == (1, 2)
    assert len(pickle.dumps(first)) < 1000


def test_loading_after_iter_and_before_the_first_mini_batch_counts(whole: Snapshot) -> None:
    expected = batches_of(dataset_of(whole))
    dataset = dataset_of(whole)
    iterator = iter(dataset)
    next(iterator)
    state = dataset.state_dict()
    resumed = dataset_of(whole)
    iter(resumed)
    iterator = iter(resumed)
    resumed.load_state_dict(state)
    assert [obs["soma_joinid"].tolist() for _, obs in iterator] == expected[1:]


def test_a_drawn_seed_comes_back_with_the_state(whole: Snapshot) -> None:
    dataset = dataset_of(whole, seed=None)
    expected = batches_of(dataset)
    dataset.set_epoch(0)
    iterator = iter(dataset)
    next(iterator)
    resumed = dataset_of(whole, seed=None)
    resumed.load_state_dict(dataset.state_dict())
    assert batches_of(resumed) == expected[1:]


# With torchdata -------------------------------------------------------------------------------------------


def stateful_loader_of(snapshot: Snapshot, n_workers: int, persistent: bool) -> Any:
    kept = {"multiprocessing_context": "fork", "persistent_workers": persistent} if n_workers else {}
    dataset = dataset_of(snapshot, 100)
    return StatefulDataLoader(
        dataset, batch_size=None, num_workers=n_workers, collate_fn=lambda batch: batch, **kept
    )


@pytest.mark.parametrize(("n_workers", "persistent"), [(0, False), (1, False), (2, False), (2, True)])
def test_a_dataset_alone_resumes_in_a_stateful_data_loader(
    whole: Snapshot, n_workers: int, persistent: bool
) -> None:
    loader = stateful_loader_of(whole, n_workers, persistent)
    expected = [batches_of(loader) for _ in range(3)]
    assert expected[0] != expected[1] != expected[2]
    n_batches = len(expected[0])
    for n_yielded in (1, 4, n_batches - 1):
        loader = stateful_loader_of(whole, n_workers, persistent)
        iterator = iter(loader)
        for _ in range(n_yielded):
            next(iterator)
        resumed = stateful_loader_of(whole, n_workers, persistent)
        resumed.load_state_dict(loader.state_dict())
        assert batches_of(resumed) == expected[0][n_yielded:]
        assert [batches_of(resumed) for _ in range(2)] == expected[1:]
    loader = stateful_loader_of(whole, n_workers, persistent)
    batches_of(loader)
    resumed = stateful_loader_of(whole, n_workers, persistent)
    resumed.load_state_dict(loader.state_dict())
    assert batches_of(resumed) == expected[1]


def test_joinids_and_X_stay_together_after_a_resume(store: Store) -> None:
    dataset = store.dataset(batch_size=9, seed=1, shuffle_scope="global", io_batch_size=50)
    iterator = iter(dataset)
    before = [next(iterator) for _ in range(5)]
    resumed = store.dataset(batch_size=9, seed=1, shuffle_scope="global", io_batch_size=50)
    resumed.load_state_dict(dataset.state_dict())
    assert sorted([*joinids_of(before), *joinids_of(resumed)]) == list(range(N_OBS))
