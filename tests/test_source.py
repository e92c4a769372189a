"""What a class that derives from `Source` has without writing it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from tiledbsoma_ml import Fields, Layout, QueryIDs, Source


class Least(Source):
    """A source with no more than it must have."""

    def __init__(self) -> None:
        self.query_ids = QueryIDs(obs_joinids=[5, 3, 8], var_joinids=[2, 1])

    def obs(self, obs_joinids: Any, column_names: Any) -> pd.DataFrame:
        return pd.DataFrame({"soma_joinid": obs_joinids})[list(column_names)]

    def layout(self, ids: Any, budget: Any) -> Layout:
        return Layout(1, 8.0)

    def open(self, ids: Any, fields: Any, budget: Any) -> Any:
        raise NotImplementedError


def test_var_has_the_joinids_alone() -> None:
    source = Least()
    assert source.var(np.array([1, 2])).to_dict("list") == {"soma_joinid": [1, 2]}
    assert source.var(np.array([1]), ["soma_joinid"]).to_dict("list") == {"soma_joinid": [1]}
    with pytest.raises(
        ValueError, match="column_names='symbol' must be a column of var; there are 'soma_joinid'"
    ):
        source.var(np.array([1]), ["symbol"])


def test_what_var_returns_is_no_view_of_the_joinids() -> None:
    ids = np.array([1, 2])
    found = Least().var(ids)
    found.iloc[0, 0] = 9
    assert ids.tolist() == [1, 2]


def test_check_tells_rows_and_columns_that_are_not_there() -> None:
    source, fields = Least(), Fields(obs_column_names=["soma_joinid"])
    source.check(source.query_ids, fields)
    source.check(QueryIDs(obs_joinids=[8, 8, 3], var_joinids=[1]), fields)
    with pytest.raises(
        ValueError, match="obs_joinids must be those of the source, but 2 of 3 are not, 4 for"
    ):
        source.check(QueryIDs(obs_joinids=[3, 4, 6], var_joinids=[1]), fields)
    with pytest.raises(
        ValueError, match="var_joinids must be those of the source, but 1 of 1 are not, 0 for"
    ):
        source.check(QueryIDs(obs_joinids=[3], var_joinids=[0]), fields)


def test_all_else_has_a_default() -> None:
    source = Least()
    assert source.prepare() is None
    assert (dict(source.content), source.row_tile, source.locator) == ({}, 1, None)


def test_a_class_that_lacks_a_member_cannot_be_made() -> None:
    class Lacking(Source):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Lacking()


@pytest.mark.parametrize(("names", "kind"), [("a", TypeError), ([], ValueError), (["a", "a"], ValueError)])
def test_names_of_fields_are_checked(names: Any, kind: Any) -> None:
    with pytest.raises(kind, match="obs_column_names"):
        Fields(obs_column_names=names)
