from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma as soma
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import Store
from tiledbsoma_ml._soma.arrays import naming_rows, ranges, to_numpy


@settings(max_examples=200)
@given(
    ids=st.sets(st.integers(0, 60), min_size=1),
    starts=st.sets(st.integers(0, 20)),
    at_most=st.integers(1, 60),
)
def test_all_ids_from_the_first_to_the_last_of_each_run_are_asked_for(
    ids: set[int], starts: set[int], at_most: int
) -> None:
    sorted_joinids = np.array(sorted(ids))
    borders = [*sorted({0} | {k for k in starts if k < len(sorted_joinids)}), len(sorted_joinids)]
    wanted = [
        joinid
        for start, stop in pairwise(borders)
        for joinid in range(sorted_joinids[start], sorted_joinids[stop - 1] + 1)
    ]
    found = ranges(sorted_joinids, np.array(borders[:-1]), at_most)
    if isinstance(found, slice):
        assert wanted == list(range(found.start, found.stop + 1))
    elif len(wanted) > at_most:
        assert found.tolist() == sorted_joinids.tolist()
    else:
        assert found.tolist() == wanted
        assert (np.diff(found) > 1).any(), "what touches is asked for as a slice"


def test_a_column_in_one_piece_is_not_copied_and_pieces_are_put_together() -> None:
    column = pa.chunked_array([np.arange(5)])
    assert np.shares_memory(to_numpy(column), column.chunk(0).to_numpy())
    assert to_numpy(pa.chunked_array([[1, 2], [], [3]])).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("ids", "rows"), [(np.array([3, 8, 9]), "rows 3 to 9"), (np.array([], dtype=np.int64), "no rows")]
)
def test_an_error_of_tiledb_is_told_with_the_rows_the_array_and_its_cause(
    store: Store, ids: np.ndarray, rows: str
) -> None:
    cause = soma.SOMAError("checksum mismatch. ")
    with store.locator.open() as (X, _), pytest.raises(soma.SOMAError) as told, naming_rows(X, ids):
        raise cause
    assert str(told.value).startswith(
        f"{rows} of {X.uri!r} must be readable, but: checksum mismatch; try again"
    )
    assert told.value.__cause__ is cause
