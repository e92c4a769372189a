from __future__ import annotations

import multiprocessing
import pickle
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from stores import fork_server, workers
from tiledbsoma_ml._epoch.counter import N_PROCESSES, EpochCounter

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def take(counter: EpochCounter, n: int) -> list[int]:
    return [counter.take() for _ in range(n)]


def test_epochs_count_from_0() -> None:
    assert take(EpochCounter(), 4) == [0, 1, 2, 3]


def test_the_current_epoch_is_the_one_taken_last() -> None:
    counter = EpochCounter()
    assert counter.current == 0
    for epoch in range(3):
        assert counter.take() == epoch
        assert counter.current == epoch


def test_set_chooses_the_epoch_that_is_taken_next_and_counting_goes_on_from_there() -> None:
    counter = EpochCounter()
    counter.take()
    counter.set(7)
    assert counter.current == 7
    assert take(counter, 3) == [7, 8, 9]


def test_an_epoch_may_be_set_again_or_back() -> None:
    counter = EpochCounter()
    for epoch in (5, 5, 2, 0):
        counter.set(epoch)
        assert counter.take() == epoch
    assert counter.take() == 1


def test_of_several_settings_the_last_one_counts() -> None:
    counter = EpochCounter()
    counter.set(7)
    counter.set(4)
    assert take(counter, 2) == [4, 5]


def test_a_pickled_copy_starts_from_the_current_epoch() -> None:
    counter = EpochCounter()
    counter.set(3)
    copy = pickle.loads(pickle.dumps(counter))
    assert copy.current == 3
    assert take(copy, 2) == [3, 4]
    assert take(counter, 2) == [3, 4]


def test_a_pickled_copy_of_a_counter_in_use_goes_on_as_the_counter_does() -> None:
    counter = EpochCounter()
    take(counter, 3)
    copy = pickle.loads(pickle.dumps(counter))
    assert copy.current == counter.current
    assert take(copy, 2) == take(counter, 2)


# Copies in other processes --------------------------------------------------------------------------------


def answer_with_epochs(counter: EpochCounter, pipe: Connection) -> None:
    while pipe.recv() == "take":
        pipe.send(counter.take())


@contextmanager
def copy_in_another_process(counter: EpochCounter) -> Iterator[Callable[[], int]]:
    """Start a process that holds a copy of `counter`; yield the `take` of that copy."""
    here, there = fork_server().Pipe()
    process = fork_server().Process(target=answer_with_epochs, args=(counter, there), daemon=True)
    process.start()

    def take_there() -> int:
        here.send("take")
        assert here.poll(120)
        return here.recv()

    try:
        yield take_there
    finally:
        here.send("end")
        process.join()
    assert process.exitcode == 0


def test_a_copy_in_another_process_counts_by_itself_and_sees_what_is_set_here() -> None:
    counter = EpochCounter()
    counter.set(3)
    with copy_in_another_process(counter) as take_there:
        assert [take_there(), take_there()] == [3, 4]
        counter.set(9)
        assert [take_there(), take_there()] == [9, 10]
        counter.set(9)
        assert take_there() == 9
        counter.set(1)
        counter.set(0)
        assert [take_there(), take_there()] == [0, 1]
        assert counter.take() == 0


def test_a_fresh_copy_gives_the_epoch_that_it_was_copied_with_before_any_that_is_set_later() -> None:
    counter = EpochCounter()
    counter.set(3)
    with copy_in_another_process(counter) as take_there:
        counter.set(8)
        assert [take_there(), take_there(), take_there()] == [3, 8, 9]


# Copies in workers of a plain DataLoader ------------------------------------------------------------------


class Counting(IterableDataset):
    """Yields the number of the worker and of the epoch, twice."""

    def __init__(self) -> None:
        self.counter = EpochCounter()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.counter.take()
        for _ in range(2):
            yield get_worker_info().id, epoch


def epochs_of(loader: Iterator[tuple[int, int]], n_workers: int) -> set[int]:
    found = list(loader)
    assert sorted({worker for worker, _ in found}) == list(range(n_workers))
    return {epoch for _, epoch in found}


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("n_workers", [1, 2, 3])
def test_all_workers_of_a_plain_loader_are_in_the_same_epoch_and_each_iteration_in_the_next(
    n_workers: int, persistent: bool
) -> None:
    dataset = Counting()
    options = {"num_workers": n_workers, "persistent_workers": persistent}
    loader = DataLoader(dataset, batch_size=None, multiprocessing_context="fork", **options)
    assert [epochs_of(loader, n_workers) for _ in range(3)] == [{0}, {1}, {2}]
    assert (dataset.counter.current, dataset.counter.upcoming) == (2, 3)
    dataset.counter.set(1)
    assert [epochs_of(loader, n_workers) for _ in range(2)] == [{1}, {2}]
    if not persistent:  # what is copied anew knows what this process did in the meantime
        assert dataset.counter.take() == 3
        assert epochs_of(loader, n_workers) == {4}


def test_iterations_with_the_same_seed_are_told_apart() -> None:
    loader = DataLoader(Counting(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    found = []
    for _ in range(3):
        torch.manual_seed(7)
        found.append(epochs_of(loader, 2))
    assert found == [{0}, {1}, {2}]


def test_iterations_that_are_left_early_or_go_on_side_by_side_have_epochs_of_their_own() -> None:
    loader = DataLoader(Counting(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert next(iter(loader))[1] == 0
    one = iter(loader)
    first = next(one)
    other = iter(loader)
    assert {epoch for _, epoch in [first, *one]} == {1}
    assert {epoch for _, epoch in other} == {2}


def in_a_process_of_its_own(dataset: Counting, pipe: Connection) -> None:
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")
    pipe.send([epochs_of(loader, 1) for _ in range(2)])


def test_processes_that_share_a_counter_do_not_move_each_others_epochs() -> None:
    dataset = Counting()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    ranks = [context.Process(target=in_a_process_of_its_own, args=(dataset, there)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    assert [here.recv() for _ in ranks] == [[{0}, {1}]] * 2
    for rank in ranks:
        rank.join()


def test_as_many_living_processes_as_there_are_rows_have_one_each_and_those_of_dead_ones_are_free() -> None:
    sleepers = [subprocess.Popen(["sleep", "60"]) for _ in range(N_PROCESSES + 1)]
    try:
        *living, another = (sleeper.pid for sleeper in sleepers)
        counter = EpochCounter()
        for process in living:
            counter._claimed(process)[-1] = process
        assert [counter._claimed(process)[-1] for process in living] == living
        sleepers[7].kill()
        sleepers[7].wait()
        counter._claimed(another)[-1] = another
        there = [*living[:7], another, *living[8:]]
        assert [counter._claimed(process)[-1] for process in there] == there
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()


def test_workers_that_get_pickled_copies_agree_too() -> None:
    loader = DataLoader(Counting(), batch_size=None, **workers(2))
    assert [epochs_of(loader, 2) for _ in range(2)] == [{0}, {1}]
