"""`check_order` lets pass what keeps its promises, and tells which one is broken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tiledbsoma_ml._order.order import Chunked, Stored, Tiled
from tiledbsoma_ml.testing import check_order

IDS = np.arange(0, 200, 2)


@pytest.mark.parametrize(
    ("order", "joinids"),
    [
        (Stored(joinids=IDS), IDS),
        (Stored(joinids=IDS[:0]), IDS[:0]),
        (Chunked.draw(IDS, 7, np.random.default_rng(0)), IDS),
        (Tiled.draw(IDS, 16, np.random.default_rng(0)), IDS),
    ],
)
def test_the_orders_of_this_package_keep_their_promises(order: Any, joinids: Any) -> None:
    check_order(order, joinids)


def test_an_order_may_repeat_joinids_and_leave_others_out() -> None:
    check_order(Stored(joinids=np.repeat(IDS[:50], 2)), IDS)


class AnyOrder:
    """An order whose members can be replaced."""

    def __init__(self, **members: Any) -> None:
        self.members = {"n_rows": 100, "borders": (), "rows": lambda start, stop: IDS[start:stop].copy()}
        self.members |= members

    def __getattr__(self, name: str) -> Any:
        member = self.members[name]
        return member() if callable(member) and name != "rows" else member


def _changing(values: Any) -> Any:
    found = iter(values)
    return lambda: next(found)


@pytest.mark.parametrize(
    ("sentence", "members"),
    [
        ("`n_rows` must be a number of rows", {"n_rows": 3.0}),
        ("`n_rows` must be the number of joinids", {"n_rows": 101}),
        ("`n_rows` must be the number of joinids", {"n_rows": 99}),
        ("must be n_rows joinids, int64", {"rows": lambda start, stop: IDS[start : stop - 1]}),
        ("must be n_rows joinids, int64", {"rows": lambda start, stop: IDS[start:stop].tolist()}),
        ("`rows` must be rows of the query", {"rows": lambda start, stop: IDS[start:stop] + 1}),
        ("must be that span", {"rows": lambda start, stop: np.roll(IDS, start)[start:stop]}),
        (
            "must be that span",
            {"rows": lambda start, stop: np.random.default_rng().permutation(IDS)[start:stop]},
        ),
        ("must belong to the caller|must be that span", {"rows": lambda start, stop: KEPT[start:stop]}),
        ("`borders` must ascend", {"borders": [50, 50, 100]}),
        ("`borders` must be numbers of rows", {"borders": [0.5, 100]}),
        ("The last of `borders` must be `n_rows`", {"borders": [50, 99]}),
        ("`borders` must stay as they are", {"borders": _changing([[10, 100], [20, 100]])}),
        ("`n_rows` must stay as it is", {"n_rows": _changing([100, 101, 101])}),
    ],
)
def test_an_order_that_breaks_a_promise_is_told_which(sentence: str, members: Any) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_order(AnyOrder(**members), IDS)


KEPT = IDS.copy()
