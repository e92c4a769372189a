from __future__ import annotations

import numpy as np
import pytest

from stores import DTYPES as TYPES_OF_X
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.snapshot.shard import DTYPES, ENDINGS, stored_dtypes


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_stored_in_types_that_ascend_in_width_and_end_with_their_own(dtype: str) -> None:
    types = [np.dtype(name) for name in stored_dtypes(dtype)]
    assert types[-1] == np.dtype(dtype)
    assert [t.itemsize for t in types] == sorted(t.itemsize for t in types)
    assert {np.dtype(name).str for name in TYPES_OF_X} <= set(DTYPES)


def test_a_shard_has_a_file_of_each_ending_and_a_table_only_if_it_is_compressed(either: Snapshot) -> None:
    for number, shard in enumerate(either._manifest.layers[0].shards):
        endings = ENDINGS[:3] if either.compression is None else ENDINGS
        assert [file.name for file in shard.files] == [f"shard-{number:05}{ending}" for ending in endings]
        assert shard.is_named(f"shard-{number:05}")
        assert not shard.is_named("shard-99999")
