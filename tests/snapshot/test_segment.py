from __future__ import annotations

import numpy as np

from tiledbsoma_ml import QueryIDs
from tiledbsoma_ml.snapshot.segment import in_ascending_order


def test_the_rows_of_a_part_ascend_and_none_is_there_twice_while_its_columns_stay() -> None:
    ids = QueryIDs(obs_joinids=[9, 3, 9, 200, 3], var_joinids=[5, 1])
    assert in_ascending_order(ids) == QueryIDs(obs_joinids=[3, 9, 200], var_joinids=[5, 1])
    np.testing.assert_array_equal(ids.obs_joinids, [9, 3, 9, 200, 3])
