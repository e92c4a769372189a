"""`check_order`: checks the promises of an `Order`."""

from __future__ import annotations

import numpy as np

from tiledbsoma_ml._common import NDArrayJoinId
from tiledbsoma_ml._order.order import Order
from tiledbsoma_ml.testing.case import require

N_SPANS = 50
"""Number of random spans that are compared with the order of all rows."""


def check_order(order: Order, joinids: NDArrayJoinId) -> None:
    """Raise an AssertionError that names the broken promise, unless an order keeps all promises.

    Args:
        order: The order of an epoch. All of its rows are asked for.
        joinids: Joinids of the rows of the query, as many as the order has rows. The order may repeat a
            joinid, and leave out another.
    """
    n = order.n_rows
    require(isinstance(n, int) and n >= 0, "`n_rows` must be a number of rows", f"it is {n!r}")
    expected_n = len(joinids)
    require(n == expected_n, "`n_rows` must be the number of joinids", f"it is {n}, not {expected_n}")
    rows = order.rows(0, n)
    is_array = isinstance(rows, np.ndarray) and rows.dtype == np.int64 and rows.shape == (n,)
    kind = f"{getattr(rows, 'dtype', type(rows).__name__)} of shape {np.shape(rows)}"
    require(is_array, "`rows(0, n_rows)` must be n_rows joinids, int64", f"they are {kind}")
    others = np.setdiff1d(rows, joinids)
    require(not len(others), "`rows` must be rows of the query", f"{others[:3].tolist()} are not")
    expected = rows.copy()
    _check_borders(order, n)
    rng = np.random.default_rng(0)
    spans = [(0, 0), (n, n), (0, n), (0, min(1, n)), (max(0, n - 1), n)]
    spans += np.sort(rng.integers(0, n + 1, (N_SPANS, 2)), axis=1).tolist()
    for start, stop in spans:
        found = order.rows(start, stop)
        require(
            np.array_equal(found, expected[start:stop]),
            "`rows(start, stop)` must be that span of `rows(0, n_rows)`, whenever it is called",
            f"rows({start}, {stop}) is not",
        )
        if found.flags.writeable:
            found[...] = -1
    require(
        np.array_equal(order.rows(0, n), expected),
        "What `rows` returns must belong to the caller",
        "the order changed when it was written to",
    )
    require(order.n_rows == n, "`n_rows` must stay as it is", f"it was {n} and is {order.n_rows}")


def _check_borders(order: Order, n_rows: int) -> None:
    borders = np.asarray(order.borders)
    if not len(borders):
        return
    require(borders.dtype.kind in "iu", "`borders` must be numbers of rows", f"they are {borders.dtype}")
    ascend = borders[0] >= 0 and (borders[1:] > borders[:-1]).all()
    require(bool(ascend), "`borders` must ascend", f"they are {borders[:6].tolist()} …")
    require(
        int(borders[-1]) == n_rows,
        "The last of `borders` must be `n_rows`",
        f"it is {borders[-1]}, not {n_rows}",
    )
    again = np.asarray(order.borders)
    require(np.array_equal(borders, again), "`borders` must stay as they are", "they changed")
