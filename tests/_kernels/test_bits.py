from __future__ import annotations

import numpy as np

from tiledbsoma_ml._kernels.bits import as_bits


def test_values_are_viewed_as_bits_of_their_width_without_a_copy() -> None:
    for dtype in (np.bool_, np.int8, np.uint16, np.float32, np.int64, np.float64):
        values = np.ones(3, dtype=dtype)
        bits = as_bits(values)
        assert (bits.dtype.kind, bits.dtype.itemsize) == ("u", values.dtype.itemsize)
        assert np.shares_memory(bits, values)
