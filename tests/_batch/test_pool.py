from __future__ import annotations

import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tiledbsoma_ml._batch.pool import Pool

FLOAT = np.dtype(np.float32)
SHAPE = (40, 50)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def make_pool(max_bytes: int) -> Pool:
    """Return a pool that keeps small arrays as well."""
    return Pool(max_bytes, small_bytes=1)


def test_memory_that_nobody_holds_is_used_again_for_what_fits() -> None:
    pool = make_pool(2**20)
    first = pool.empty((64, 100), FLOAT)
    place = address(first)
    del first
    larger, smaller = pool.empty((64, 100), np.dtype(np.float64)), pool.empty(100, FLOAT)
    assert place not in (address(larger), address(smaller)), "too small, or most of it would lie idle"
    again = pool.empty(6000, FLOAT)
    assert address(again) == place
    assert (again.shape, again.dtype, again.flags.writeable) == ((6000,), FLOAT, True)


@pytest.mark.parametrize(
    "hold",
    [
        lambda X: X,
        lambda X: X[1:2, 3],
        lambda X: X.T.ravel(order="K")[:1],
        torch.from_numpy,
        torch.as_tensor,
        lambda X: torch.as_tensor(X)[0].view(torch.int32),
        torch.from_dlpack,
        lambda X: memoryview(X),
        lambda X: {"X": [X]},
        iter,
        lambda X: X.view(np.uint8).reshape(-1)[3:4].data,
    ],
    ids=[
        "array",
        "view",
        "flat view",
        "tensor",
        "as_tensor",
        "row of a tensor",
        "dlpack",
        "memoryview",
        "container",
        "iterator",
        "memoryview of a view",
    ],
)
def test_memory_that_somebody_still_looks_into_is_never_given_out(hold: object) -> None:
    pool = make_pool(2**20)
    X = pool.empty(SHAPE, FLOAT)
    X[:] = 7
    place, held = address(X), hold(X)  # type: ignore[operator]
    del X
    for _ in range(6):
        other = pool.empty(SHAPE, FLOAT)
        assert address(other) != place
        other[:] = 1
    del held
    gc.collect()
    assert place in {address(X) for X in [pool.empty(SHAPE, FLOAT) for _ in range(3)]}


def test_what_is_pickled_or_in_a_cycle_has_memory_of_its_own() -> None:
    pool = make_pool(2**20)
    X = pool.empty(SHAPE, FLOAT)
    X[:] = 7
    cycle: list[object] = [X]
    cycle.append(cycle)
    copy = pickle.loads(pickle.dumps(X))
    del X
    pool.empty(SHAPE, FLOAT)[:] = 1
    assert (cycle[0] == 7).all()  # type: ignore[attr-defined]
    assert (copy == 7).all()


def test_no_more_bytes_are_kept_than_asked_for_whatever_the_number_of_arrays() -> None:
    pool = make_pool(2**20)
    for n in (2**18, 2**16, 2**17, 2**18 + 1, 2**19):  # 1 MiB, and a quarter, half, more and twice of it
        held = [pool.empty(n, FLOAT) for _ in range(4)]
        del held
        assert pool.free_bytes <= 2**20
    assert pool.free_bytes > 0


def test_memory_comes_back_also_after_its_pool_is_gone() -> None:
    X = make_pool(2**20).empty(SHAPE, FLOAT)
    X[:] = 7
    gc.collect()
    assert (X == 7).all()


def test_threads_never_share_memory() -> None:
    pool = make_pool(2**16)

    def fill(number: int) -> None:
        for k in range(200):
            X = pool.empty(500 + k, FLOAT)
            X[:] = number
            np.testing.assert_array_equal(X, number)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(fill, range(8)))
    assert pool.free_bytes <= 2**16


def test_arrays_without_rows_or_columns_are_given_out() -> None:
    pool = make_pool(2**20)
    for shape in ((0, 5), (5, 0), (0, 0), 0):
        assert pool.empty(shape, FLOAT).size == 0
