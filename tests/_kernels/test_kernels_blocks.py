from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiledbsoma_ml._kernels import blocks as kernels

LENGTHS = st.lists(st.integers(0, 20), min_size=1, max_size=8)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8"])
@given(lengths=LENGTHS, are_columns=st.booleans(), seed=st.integers(0, 100), data=st.data())
def test_rows_that_are_joined_again_are_as_they_were_split(
    dtype: str, lengths: list[int], are_columns: bool, seed: int, data: st.DataObject
) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    values = np.random.default_rng(seed).integers(0, 2 ** (8 * int(dtype[1])), starts[-1], dtype)
    planes = np.empty(values.nbytes, np.uint8)
    kernels.split_rows(starts, values, are_columns, planes)

    rows = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True)), np.int64)
    expected = np.concatenate([values[:0], *(values[starts[row] : starts[row + 1]] for row in rows)])
    found = np.empty_like(expected)
    kernels.join_rows(planes, starts, rows, are_columns, found)
    np.testing.assert_array_equal(found, expected)


def test_bytes_of_one_significance_follow_each_other_and_columns_are_differences() -> None:
    starts, planes = np.array([0, 3, 3, 5]), np.empty(10, np.uint8)
    kernels.split_rows(starts, np.array([1, 0x203, 0x304, 7, 9], np.uint16), True, planes)
    assert planes.tolist() == [1, 2, 1, 7, 2, 0, 2, 1, 0, 0]
    kernels.split_rows(starts, np.array([1, 0x203, 0x304, 7, 9], np.uint16), False, planes)
    assert planes.tolist() == [1, 3, 4, 7, 9, 0, 2, 3, 0, 0]
