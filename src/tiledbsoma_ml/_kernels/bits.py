"""Views of values as bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def as_bits(values: NDArray[Any]) -> NDArray[Any]:
    """Return a view of `values` as unsigned integers of the same width."""
    return values.view(np.dtype(f"u{values.dtype.itemsize}"))
