from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiledbsoma_ml._eager_iter import EagerIterator, EagerMap, interleaved

LONG = 1_000  # seconds; only a failure waits as long


class Counting(Iterator[int]):
    """0, 1, … `n` - 1; tells which items were asked for, and whether it was closed."""

    def __init__(self, n: int, error: BaseException | None = None) -> None:
        self.asked_for = [threading.Event() for _ in range(n + 1)]
        self.error = error
        self.n_closed = 0
        self._next = 0

    def __next__(self) -> int:
        item, self._next = self._next, self._next + 1
        self.asked_for[item].set()
        if item + 1 < len(self.asked_for):
            return item
        raise self.error or StopIteration

    def close(self) -> None:
        self.n_closed += 1


@pytest.fixture(autouse=True)
def _no_thread_outlives_a_test() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@given(items=st.lists(st.none() | st.integers()))
def test_it_yields_the_items_of_the_iterator_in_order(items: list[int | None]) -> None:
    assert list(EagerIterator(iter(items))) == items


def test_after_the_last_item_it_is_at_its_end_for_good() -> None:
    eager = EagerIterator(iter([1]))
    assert [next(eager), next(eager, "end"), next(eager, "end")] == [1, "end", "end"]


def test_an_empty_iterator_has_no_items() -> None:
    iterator = Counting(0)
    assert list(EagerIterator(iterator)) == []
    assert iterator.n_closed == 1


def test_an_item_is_computed_before_it_is_asked_for() -> None:
    iterator = Counting(3)
    with EagerIterator(iterator) as eager:
        assert iterator.asked_for[0].wait(LONG)
        assert next(eager) == 0
        assert iterator.asked_for[1].wait(LONG)


def test_an_item_is_not_computed_before_the_one_before_it_was_taken() -> None:
    iterator = Counting(3)
    with ThreadPoolExecutor(1) as pool, EagerIterator(iterator, pool) as eager:
        assert next(eager) == 0
        pool.submit(lambda: None).result()  # whatever was submitted before is done now
        assert iterator.asked_for[1].is_set()
        assert not iterator.asked_for[2].is_set()


def test_items_are_computed_on_another_thread() -> None:
    with EagerIterator(iter(threading.get_ident, None)) as eager:
        assert next(eager) != threading.get_ident()


# Exceptions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("bad row"), KeyboardInterrupt(), MemoryError()])
def test_an_exception_is_raised_as_it_is_in_the_place_of_its_item(error: BaseException) -> None:
    iterator = Counting(2, error)
    eager = EagerIterator(iterator)
    assert [next(eager), next(eager)] == [0, 1]
    with pytest.raises(type(error)) as caught:
        next(eager)
    assert caught.value is error
    assert caught.value.__cause__ is None
    assert next(eager, "end") == "end"
    assert iterator.n_closed == 1


def test_the_traceback_of_an_exception_leads_to_where_it_was_raised() -> None:
    def failing() -> Iterator[int]:
        yield 1 // 0

    with pytest.raises(ZeroDivisionError) as caught:
        list(EagerIterator(failing()))
    assert caught.traceback[-1].name == "failing"


def test_an_exception_that_nobody_came_to_is_dropped_on_close() -> None:
    iterator = Counting(1, ValueError("too late"))
    with EagerIterator(iterator) as eager:
        assert next(eager) == 0
    assert iterator.n_closed == 1


# Closing --------------------------------------------------------------------------------------------------


def leave(eager: EagerIterator[int]) -> None:
    with eager:
        pass


def leave_by_an_exception(eager: EagerIterator[int]) -> None:
    with pytest.raises(ValueError, match="mine"), eager:
        raise ValueError("mine")


def close_twice(eager: EagerIterator[int]) -> None:
    eager.close()
    eager.close()


@pytest.mark.parametrize("end", [EagerIterator.close, close_twice, leave, leave_by_an_exception])
@pytest.mark.parametrize("n_taken", [0, 1, 2])
def test_abandoned_midway_it_ends_its_thread_and_the_generator(
    end: Callable[[EagerIterator[int]], None], n_taken: int
) -> None:
    started, log = threading.Event(), []

    def generator() -> Iterator[int]:
        try:
            started.set()
            yield from range(100)
        finally:
            log.append("closed")

    before = set(threading.enumerate())
    eager = EagerIterator(generator())
    assert started.wait(LONG)
    for item in range(n_taken):
        assert next(eager) == item
    assert set(threading.enumerate()) - before
    end(eager)
    assert not set(threading.enumerate()) - before
    assert log == ["closed"]
    assert next(eager, "end") == "end"


def test_close_waits_for_the_item_that_is_being_computed() -> None:
    started, release = threading.Event(), threading.Event()
    log = []

    def generator() -> Iterator[int]:
        started.set()
        assert release.wait(LONG)
        log.append("computed")
        yield 0

    eager = EagerIterator(generator())
    assert started.wait(LONG)
    closing = threading.Thread(target=lambda: (eager.close(), log.append("closed")))
    closing.start()
    closing.join(timeout=0.05)
    assert log == []
    release.set()
    closing.join()
    assert log == ["computed", "closed"]


def test_an_iterator_that_cannot_be_closed_is_left_alone() -> None:
    items = iter([1, 2, 3])
    eager = EagerIterator(items)
    assert next(eager) == 1
    eager.close()
    assert list(items)[-1:] == [3]


# A shared pool --------------------------------------------------------------------------------------------


def test_a_shared_pool_serves_others_after_one_is_closed() -> None:
    with ThreadPoolExecutor(1) as pool:
        closed, other = EagerIterator(Counting(3), pool), EagerIterator(iter("ab"), pool)
        closed.close()
        assert list(other) == ["a", "b"]
        assert pool.submit(lambda: 7).result() == 7


def test_an_item_that_waits_for_a_busy_pool_is_never_computed_after_close() -> None:
    iterator, release = Counting(3), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(release.wait, LONG)
        eager = EagerIterator(iterator, pool)
        eager.close()
        release.set()
    assert not iterator.asked_for[0].is_set()
    assert iterator.n_closed == 1
    assert next(eager, "end") == "end"


# Several threads ------------------------------------------------------------------------------------------


@given(items=st.lists(st.integers()), n_threads=st.integers(1, 4))
def test_a_map_yields_results_in_the_order_of_the_items(items: list[int], n_threads: int) -> None:
    assert list(EagerMap(str, iter(items), n_threads)) == list(map(str, items))


def test_as_many_items_are_computed_at_once_as_there_are_threads() -> None:
    together = threading.Barrier(3, timeout=LONG)
    with EagerMap(lambda _: together.wait(), iter(range(6)), n_threads=3) as results:
        assert sorted(list(results)[:3]) == [0, 1, 2]


def test_a_map_takes_no_more_items_than_it_has_threads_for() -> None:
    iterator = Counting(9)
    with EagerMap(str, iterator, n_threads=2) as results:
        assert not iterator.asked_for[2].is_set()
        assert next(results) == "0"
        assert iterator.asked_for[2].is_set()
        assert not iterator.asked_for[3].is_set()
    assert iterator.n_closed == 1


@pytest.mark.parametrize("error", [ValueError("bad row"), KeyboardInterrupt()])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_an_exception_of_a_map_comes_in_the_place_of_its_item(error: BaseException, n_threads: int) -> None:
    def fail_at_2(item: int) -> int:
        if item == 2:
            raise error
        return item

    for results in (
        EagerMap(fail_at_2, Counting(9), n_threads),
        EagerMap(lambda item: item, Counting(2, error), n_threads),
    ):
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(type(error)) as caught:
            next(results)
        assert caught.value is error
        assert next(results, "end") == "end"


def test_closing_a_map_waits_for_what_is_computed_and_drops_the_rest() -> None:
    begun, go_on, done = threading.Event(), threading.Event(), []

    def compute(item: int) -> None:
        begun.set()
        go_on.wait(LONG)
        done.append(item)

    results = EagerMap(compute, iter(range(9)), n_threads=1)
    assert begun.wait(LONG)
    closing = threading.Thread(target=results.close)
    closing.start()
    assert closing.is_alive()
    go_on.set()
    closing.join(LONG)
    assert done == [0]
    assert next(results, "end") == "end"


# Several iterators ----------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers()), max_size=5))
def test_interleaved_iterators_give_all_of_their_items_in_turn(items: list[list[int]]) -> None:
    rounds = [list(filter(None, row)) for row in zip_longest(*([(i,) for i in some] for some in items))]
    assert list(interleaved([iter(some) for some in items])) == [i for row in rounds for (i,) in row]


def test_all_interleaved_iterators_are_advanced_at_once() -> None:
    meeting = threading.Barrier(4)

    def items() -> Iterator[int]:
        meeting.wait(LONG)
        yield 0

    assert list(interleaved([items() for _ in range(4)])) == [0, 0, 0, 0]


def test_an_exception_of_an_interleaved_iterator_is_raised_and_all_are_closed() -> None:
    iterators = [Counting(3), Counting(1, OSError("no luck")), Counting(3)]
    found = interleaved(iterators)
    assert [next(found) for _ in range(4)] == [0, 0, 0, 1]
    with pytest.raises(OSError, match="no luck"):
        next(found)
    assert all(iterator.n_closed for iterator in iterators)


def test_leaving_closes_all_interleaved_iterators() -> None:
    iterators = [Counting(3), Counting(3)]
    found = interleaved(iterators)
    next(found)
    found.close()
    assert all(iterator.n_closed for iterator in iterators)
