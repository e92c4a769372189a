from __future__ import annotations

import numpy as np

from tiledbsoma_ml.snapshot.stored_layers import shard_borders


def test_shards_are_whole_tiles_unless_one_is_larger() -> None:
    tiles = np.repeat([0, 1, 2, 5, 6], [10, 10, 4, 10, 30])
    assert shard_borders(tiles, 20) == [20, 34, 54, 64]
    assert shard_borders(tiles, 1000) == [64]
    assert shard_borders(tiles[:0], 20) == []
