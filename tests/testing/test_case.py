from __future__ import annotations

import pytest

from plain_source import (
    Plain,
)
from tiledbsoma_ml import QueryIDs
from tiledbsoma_ml.testing import check_source


def test_a_source_that_is_too_small_to_tell_is_refused() -> None:
    small = Plain()
    small.query_ids = QueryIDs(obs_joinids=[0], var_joinids=[0, 1])
    with pytest.raises(ValueError, match="two rows and two columns at least"):
        check_source(small)
