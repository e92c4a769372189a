from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiledbsoma_ml._kernels import blocks as kernels

LENGTHS = st.lists(st.integers(0, 20), min_size=1, max_size=8)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8"])
@given(lengths=LENGTHS, seed=st.integers(0, 100), data=st.data())
def test_rows_that_are_joined_again_are_as_they_were_split(
    dtype: str, lengths: list[int], seed: int, data: st.DataObject
) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    largest = 2 ** (8 * int(dtype[1])) >> 8 * (seed % int(dtype[1]))
    given_values = np.random.default_rng(seed).integers(0, largest, starts[-1], dtype)
    rows = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True)), np.int64)
    expected = np.concatenate([given_values[:0], *(given_values[starts[r] : starts[r + 1]] for r in rows)])

    planes, columns = np.empty(given_values.nbytes, np.uint8), np.empty_like(expected)
    kernels.split_columns(starts, given_values, planes)
    kernels.join_columns(planes, starts, rows, columns)
    np.testing.assert_array_equal(columns, expected)

    if dtype == "u8":  # such values count as two of four bytes
        return
    n, width = len(given_values), given_values.itemsize
    planes, pairs = np.empty(2 * width * ((n + 1) // 2), np.uint8), np.empty((n + 1) // 2, f"u{2 * width}")
    kernels.split_values(given_values, planes)
    kernels.join_values(planes, pairs)
    values, some = pairs.view(dtype)[:n], np.empty_like(expected)
    np.testing.assert_array_equal(values, given_values)
    kernels.take_rows(values, starts, rows, some)
    np.testing.assert_array_equal(some, expected)


def test_bytes_of_differences_of_columns_follow_each_other_by_their_significance() -> None:
    starts, planes = np.array([0, 3, 3, 5]), np.empty(10, np.uint8)
    kernels.split_columns(starts, np.array([1, 0x203, 0x304, 7, 9], np.uint16), planes)
    assert planes.tolist() == [1, 2, 1, 7, 2, 0, 2, 1, 0, 0]


def test_four_bits_of_values_follow_each_other_by_their_significance_two_to_a_byte() -> None:
    planes = np.empty(12, np.uint8)
    kernels.split_values(np.array([0x1, 0x203, 0x304, 0x7, 0xF29], np.uint16), planes)
    assert planes.tolist() == [0x31, 0x74, 0x09, 0x00, 0x00, 0x02, 0x20, 0x03, 0x0F, 0x00, 0x00, 0x00]
