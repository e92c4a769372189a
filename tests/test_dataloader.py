from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from epochs import SCOPES, batches_of, dataset_of, loader_of
from stores import N_OBS, N_VARS, Store, expected_X, fork_server, joinids_of, workers
from tiledbsoma_ml import Snapshot, dataloader, experiment_dataloader

# 311 rows over 2 workers are 156 and 155: with 31 rows a mini-batch, 6 and 5 mini-batches.
UNEVEN = {"batch_size": 31, "io_batch_size": 64, "seed": 4}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* changes nothing here: "),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


def without_workers_in_turn(store: Store, epoch: int, **options: Any) -> np.ndarray:
    """Return the joinids that two workers yield in turn, computed without workers."""
    halves = np.array_split(np.arange(N_OBS), 2)
    datasets = [store.dataset(half, **options) for half in halves]
    for dataset in datasets:
        dataset.set_epoch(epoch)
    one, other = (list(dataset) for dataset in datasets)
    in_turn = [mini_batch for pair in zip(one, other, strict=False) for mini_batch in pair]
    return joinids_of(in_turn + one[len(other) :])


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_yield_every_row_once_in_a_new_order_every_epoch(store: Store, persistent: bool) -> None:
    dataset = store.dataset(**UNEVEN)
    loader = experiment_dataloader(dataset, **workers(2), persistent_workers=persistent)
    for epoch in range(2):
        mini_batches = list(loader)
        assert dataset.epoch == epoch
        assert len(loader) == len(mini_batches) == 11
        np.testing.assert_array_equal(
            joinids_of(mini_batches), without_workers_in_turn(store, epoch, **UNEVEN)
        )
    loader.dataset.set_epoch(1)
    for epoch in (1, 2):
        np.testing.assert_array_equal(joinids_of(loader), without_workers_in_turn(store, epoch, **UNEVEN))


def test_an_epoch_that_was_left_early_does_not_confuse_persistent_workers(store: Store) -> None:
    loader = experiment_dataloader(store.dataset(**UNEVEN), **workers(2))
    next(iter(loader))
    np.testing.assert_array_equal(joinids_of(loader), without_workers_in_turn(store, 1, **UNEVEN))


def test_without_workers_the_loader_yields_what_the_dataset_does(store: Store) -> None:
    dataset, same = store.dataset(**UNEVEN), store.dataset(**UNEVEN)
    loader = experiment_dataloader(dataset)
    for _ in range(2):
        assert len(loader) == 11
        for (X, obs), (same_X, same_obs) in zip(loader, same, strict=True):
            assert isinstance(X, np.ndarray)
            np.testing.assert_array_equal(X, same_X)
            pd.testing.assert_frame_equal(obs, same_obs)
    assert dataset.epoch == 1


def test_sparse_x_and_obs_of_every_type_come_through_workers(store: Store) -> None:
    columns = ["soma_joinid", "cell_type", "maybe_int", "maybe_bool", "taken_at", "barcode"]
    dataset = store.dataset(
        range(60), obs_column_names=columns, return_sparse_X=True, batch_size=16, shuffle=False
    )
    rows = []
    for X, obs in experiment_dataloader(dataset, num_workers=1):  # spawned
        assert isinstance(X, sparse.csr_matrix)
        np.testing.assert_array_equal(X.toarray(), expected_X(obs["soma_joinid"], range(N_VARS)))
        rows.append(obs)
    expected = [
        obs for _, obs in store.dataset(range(60), obs_column_names=columns, shuffle=False, batch_size=60)
    ]
    found = pd.concat(rows).sort_values("soma_joinid", ignore_index=True)
    pd.testing.assert_frame_equal(found, expected[0])


def test_more_workers_than_rows_yield_every_row_once(store: Store) -> None:
    loader = experiment_dataloader(store.dataset([7], batch_size=10), **workers(2))
    assert (joinids_of(loader).tolist(), len(loader)) == ([7], 1)


def test_the_rank_of_the_training_process_reaches_its_workers(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    loader = experiment_dataloader(store.dataset(range(100), batch_size=10), **workers(2))
    assert sorted(joinids_of(loader)) == list(range(50, 100))
    assert len(loader) == 6


def test_set_epoch_reaches_the_persistent_workers_of_a_plain_dataloader(store: Store) -> None:
    dataset = store.dataset(**UNEVEN)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        collate_fn=as_it_is,
        persistent_workers=True,
        **workers(2),
    )
    iterations = []
    for epoch in (0, 5, 2):
        dataset.set_epoch(epoch)
        iterations.append(joinids_of(loader))
    for found, epoch in zip(iterations, (0, 5, 2), strict=True):
        np.testing.assert_array_equal(found, without_workers_in_turn(store, epoch, **UNEVEN))


def test_workers_are_spawned_unless_told_otherwise_and_the_process_is_left_alone(store: Store) -> None:
    before = multiprocessing.get_start_method(allow_none=True)
    environment = dict(os.environ)
    loader = experiment_dataloader(store.dataset(), num_workers=1)
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    other = experiment_dataloader(store.dataset(), num_workers=1, multiprocessing_context="forkserver")
    assert other.multiprocessing_context.get_start_method() == "forkserver"
    assert (multiprocessing.get_start_method(allow_none=True), dict(os.environ)) == (before, environment)


def loaded(pipe: Connection) -> None:
    pipe.send((set(sys.modules), threading.active_count()))


def test_the_server_of_the_tests_forks_processes_that_have_loaded_the_loops_and_run_no_thread() -> None:
    here, there = fork_server().Pipe()
    process = fork_server().Process(target=loaded, args=(there,))
    process.start()
    modules, n_threads = here.recv()
    process.join()
    assert {"tiledbsoma_ml._kernels.hold", "tiledbsoma_ml._kernels.place"} < modules
    assert n_threads == 1


def test_a_collate_function_of_the_user_is_applied(store: Store) -> None:
    loader = experiment_dataloader(
        store.dataset(range(20), batch_size=10), collate_fn=lambda item: len(item[1])
    )
    assert list(loader) == [10, 10]


def test_an_error_in_a_worker_reaches_the_training_process_with_its_cause(store: Store) -> None:
    dataset = store.dataset([1, N_OBS + 5])
    with pytest.raises(ValueError, match=r"obs_joinids must exist in obs, but 1 do not, 316 for instance"):
        list(experiment_dataloader(dataset, **workers(1)))


@pytest.mark.parametrize(
    ("exit_code", "told"),
    [
        (-signal.SIGKILL, "signal 9: memory may be short: take fewer workers"),
        (-signal.SIGBUS, r"signal 7: a file that it had mapped is damaged or was cut.*`verify\(\)`"),
        (-signal.SIGSEGV, r"signal 11: native code crashed: set PYTHONFAULTHANDLER=1.*`verify\(\)`"),
        (-signal.SIGABRT, "signal 6: native code crashed: set PYTHONFAULTHANDLER=1"),
        (-signal.SIGTERM, "signal 15: somebody ended it"),
        (3, "exit code 3: what it wrote before says why"),
    ],
)
def test_a_worker_that_died_is_told_with_its_cause_and_what_to_do(exit_code: int, told: str) -> None:
    def items() -> Iterator[int]:
        yield 0
        raise RuntimeError("told by torch")

    workers = [SimpleNamespace(exitcode=None), SimpleNamespace(exitcode=exit_code, pid=17)]
    named = dataloader._naming_dead_workers(items(), workers)  # type: ignore[arg-type]
    assert next(named) == 0
    with pytest.raises(RuntimeError, match=rf"worker 1 of 2 \(process 17\) died by {told}.*told by torch"):
        next(named)


@pytest.mark.parametrize(
    ("argument", "place"),
    [
        ({"shuffle": True}, r"shuffle=True does not apply .* set it in ExperimentDataset\(shuffle=…\)"),
        ({"batch_size": 4}, r"batch_size=4 does not apply .* set it in ExperimentDataset\(batch_size=…\)"),
        (
            {"sampler": None},
            r"sampler=None does not apply .* set it in ExperimentDataset\(shuffle=…, seed=…\)",
        ),
        (
            {"batch_sampler": []},
            r"batch_sampler=\[\] does not apply .* ExperimentDataset\(batch_size=…, shuffle=…\)",
        ),
    ],
)
def test_arguments_that_do_not_apply_are_refused_and_say_where_to_set_them(
    store: Store, argument: dict[str, Any], place: str
) -> None:
    with pytest.raises(ValueError, match=place):
        experiment_dataloader(store.dataset(), **argument)


def test_the_sum_of_datasets_is_loaded_one_after_the_other(store: Store) -> None:
    options: dict[str, Any] = {"batch_size": 8, "shuffle": False}
    loader = experiment_dataloader(
        store.dataset(range(20), **options) + store.dataset(range(30, 41), **options)
    )
    assert len(loader) == 5
    assert joinids_of(loader).tolist() == [*range(20), *range(30, 41)]


def test_what_is_no_iterable_dataset_is_refused() -> None:
    with pytest.raises(TypeError, match=r"ds must be an ExperimentDataset, not a list"):
        experiment_dataloader([1, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rank", "epochs"), [(0, [[1, 3, 0, 2], [0, 2, 1, 3]]), (1, [[5, 7, 4, 6], [4, 6, 5, 7]])]
)
def test_the_worked_example_of_the_documentation_holds(
    store: Store, rank: int, epochs: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    dataset = store.dataset(range(8), shuffle_chunk_size=2, io_batch_size=2, batch_size=1, seed=5)
    loader = experiment_dataloader(dataset, **workers(2))
    assert [joinids_of(loader).tolist() for _ in epochs] == epochs


def as_it_is(item: Any) -> Any:
    return item


# With a DataLoader ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("n_workers", [0, 1, 2, 3])
def test_a_loader_resumes_in_the_middle_and_at_the_end_of_an_epoch(
    whole: Snapshot, scope: Any, n_workers: int
) -> None:
    loader = loader_of(whole, n_workers, shuffle_scope=scope)
    expected = [batches_of(loader) for _ in range(3)]
    n_batches = len(expected[0])
    assert len(loader) == n_batches
    loader = loader_of(whole, n_workers, shuffle_scope=scope)
    states = [loader.state_dict(), *(loader.state_dict() for _ in loader)]
    for n_yielded in (0, 1, 2, 5, n_batches - 1, n_batches):
        resumed = loader_of(whole, n_workers, shuffle_scope=scope)
        resumed.load_state_dict(states[n_yielded])
        rest = expected[0][n_yielded:] if n_yielded < n_batches else []
        found = [] if n_yielded == n_batches else batches_of(resumed)
        assert found == rest
        assert batches_of(resumed) == expected[1]
        assert batches_of(resumed) == expected[2]
        del resumed


def test_a_state_that_is_loaded_into_a_loader_with_living_workers_counts(whole: Snapshot) -> None:
    loader = loader_of(whole, 2)
    expected = [batches_of(loader) for _ in range(2)]
    iterator = iter(loader_of(whole, 2))
    other = loader_of(whole, 2)
    iterator = iter(other)
    for _ in range(3):
        next(iterator)
    state = other.state_dict()
    loader.load_state_dict(state)
    assert batches_of(loader) == expected[0][3:]
    assert batches_of(loader) == expected[1]


def test_in_global_scope_a_loader_resumes_with_another_number_of_workers(whole: Snapshot) -> None:
    loader = loader_of(whole, 3, shuffle_scope="global")
    iterator = iter(loader)
    before = [next(iterator)[1]["soma_joinid"].tolist() for _ in range(4)]
    for n_workers in (0, 2):
        resumed = loader_of(whole, n_workers, shuffle_scope="global")
        resumed.load_state_dict(loader.state_dict())
        rest = batches_of(resumed)
        assert sorted(np.concatenate(before + rest).tolist()) == list(range(130))
        assert sorted(np.concatenate(batches_of(resumed)).tolist()) == list(range(130))


# Whose position it is -------------------------------------------------------------------------------------


def test_iterators_share_no_workers_unless_they_are_kept_and_the_newest_has_those(whole: Snapshot) -> None:
    options = {"num_workers": 1, "multiprocessing_context": "fork"}
    expected = loader_of(whole, 1)
    first, second = batches_of(expected), batches_of(expected)
    loader = experiment_dataloader(dataset_of(whole, 130), persistent_workers=False, **options)
    both = list(zip(loader, loader, strict=True))
    assert [batches_of(found) for found in zip(*both, strict=True)] == [first, second]
    loader = experiment_dataloader(dataset_of(whole, 130), **options)
    old = iter(loader)
    next(old)
    assert batches_of(loader) == second
    with pytest.raises(RuntimeError, match="must be the newest one, but another began since"):
        next(old)
    with pytest.raises(RuntimeError, match="must be the newest one"):
        list(zip(loader, loader, strict=True))


def test_mini_batches_out_of_order_are_refused(whole: Snapshot) -> None:
    with pytest.raises(ValueError, match="in_order=False does not apply to experiment_dataloader, whose"):
        experiment_dataloader(dataset_of(whole), num_workers=1, in_order=False)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("drop_last", "no", "drop_last='no' must be True or False"),
        ("in_order", "no", "in_order='no' must be True or False"),
        ("persistent_workers", 1, "persistent_workers=1 must be True or False"),
        ("pin_memory", "no", "pin_memory='no' must be True or False"),
        ("num_workers", "2", "num_workers='2' must be an integer of at least 0"),
    ],
)
def test_an_argument_of_the_wrong_type_is_refused_in_one_sentence(
    whole: Snapshot, name: str, value: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=f"^{message}"):
        experiment_dataloader(dataset_of(whole), **{name: value})


def test_numbers_and_bools_of_numpy_are_taken(whole: Snapshot) -> None:
    loader = experiment_dataloader(dataset_of(whole), num_workers=np.int64(0), pin_memory=np.False_)
    assert loader.num_workers == 0
    assert loader.pin_memory is False


# With torchdata -------------------------------------------------------------------------------------------


def test_a_worker_that_dies_is_named_with_its_cause(whole: Snapshot, tmp_path: Path) -> None:
    import os
    import signal

    loader = loader_of(whole, 2, use_eager_fetch=False, batch_size=1)
    iterator = iter(loader)
    next(iterator)
    os.kill(loader._iterator._workers[1].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"worker 1 of 2 \(process \d+\) died by signal 9"):
        for _ in iterator:
            pass
