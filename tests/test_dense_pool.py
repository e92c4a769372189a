from __future__ import annotations

import numpy as np
import pytest
import torch

from tiledbsoma_ml._dense_pool import DensePool

FLOAT = np.dtype(np.float32)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_that_nobody_holds_is_used_again_and_zeroed() -> None:
    pool = DensePool()
    first = pool.zeros((4, 5), FLOAT)
    first[:] = 7
    place = address(first)
    del first
    again = pool.zeros((3, 5), np.dtype(np.float64))
    assert address(again) != place, "too small"
    smaller = pool.zeros((2, 5), FLOAT)
    assert address(smaller) == place
    assert not smaller.any()
    assert (smaller.shape, smaller.dtype) == ((2, 5), FLOAT)


@pytest.mark.parametrize(
    "hold",
    [
        lambda X: X,
        lambda X: X[1:2, 3],
        lambda X: X.T.ravel(order="K")[:1],
        torch.from_numpy,
        lambda X: torch.from_numpy(X)[0],
        lambda X: memoryview(X),
        lambda X: {"X": [X]},
        iter,
    ],
    ids=["array", "view", "flat view", "tensor", "row of a tensor", "memoryview", "container", "iterator"],
)
def test_memory_that_somebody_still_looks_into_is_never_given_out(hold: object) -> None:
    pool = DensePool(n_kept=2)
    X = pool.zeros((4, 5), FLOAT)
    X[:] = 7
    place, held = address(X), hold(X)  # type: ignore[operator]
    del X
    for _ in range(6):
        other = pool.zeros((4, 5), FLOAT)
        assert address(other) != place
        other[:] = 1
    del held


def test_no_more_memory_is_kept_than_asked_for() -> None:
    pool = DensePool(n_kept=2)
    arrays = [pool.zeros((4, 5), FLOAT) for _ in range(5)]
    assert len({address(X) for X in arrays}) == 5
    assert len(pool._kept) == 2


def test_arrays_without_rows_or_columns_are_given_out() -> None:
    pool = DensePool()
    for shape in ((0, 5), (5, 0), (0, 0)):
        assert pool.zeros(shape, FLOAT).shape == shape
