from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tiledbsoma_ml._batch.pool import Pool
from tiledbsoma_ml.snapshot import Snapshot
from tiledbsoma_ml.snapshot.layer import MappedLayer, RowStarts


def test_rows_are_found_in_their_shards(either: Snapshot) -> None:
    [layer] = either._manifest.layers
    starts = RowStarts(either.path, layer, either.shape[1])
    rows = np.array([310, 0, 64, 64, 63])
    shards, begins, indptr = starts.find(rows)
    assert (starts.borders[shards] <= rows).all()
    assert (rows < starts.borders[shards + 1]).all()
    for k, row in enumerate(rows):
        own = starts.maps[shards[k]][row - starts.borders[shards[k]] :]
        assert (begins[k], begins[k] + indptr[k + 1] - indptr[k]) == (own[0], own[1])


def test_row_starts_that_change_while_they_are_mapped_are_an_error(copied_either: Path) -> None:
    snapshot = Snapshot.open(copied_either)
    reader, rows = snapshot.reader(), snapshot.obs_joinids
    X = reader.csr(rows)
    name = "shard-00001.indptr"
    starts = np.memmap(copied_either / name, "<i8", "r+")
    starts[3] = 2**40
    with pytest.raises(ValueError, match=re.escape(name)):
        Snapshot.open(copied_either).reader().csr(rows)
    with pytest.raises(ValueError, match=re.escape(name)):
        reader.csr(rows)
    shutil.rmtree(copied_either)
    assert X.shape == snapshot.shape


def test_a_mapped_layer_has_the_types_of_its_files(whole: Snapshot) -> None:
    [layer] = whole._manifest.layers
    mapped = MappedLayer(whole.path, layer, whole.shape[1])
    assert (mapped.dtype, mapped.indices_dtype) == (np.float32, np.uint16)
    located = mapped.locate(np.array([5, 1]), Pool(0))
    assert len(located) == 2
    assert located.slice(1, 2).rows.tolist() == [1]
