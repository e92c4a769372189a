"""`StoredLayers`: the types, tiles and sizes of the layers of all segments, and the borders of shards."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import attrs
import numpy as np
from numpy.typing import NDArray

from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._csr import CSR_IO_Buffer
from tiledbsoma_ml.snapshot.content import Content
from tiledbsoma_ml.snapshot.segment import Segment
from tiledbsoma_ml.snapshot.shard import DTYPES


@attrs.frozen(kw_only=True)
class ShardSizes:
    """The sizes of the shards of a snapshot.

    Attributes:
        min_bytes: Approximate smallest size of a shard, unless the snapshot has fewer bytes.
        max_bytes: Approximate largest size of a shard, unless a tile has more bytes.
        min_number: Number of shards up to which shards have the smallest size.
    """

    min_bytes: int = 2**25
    max_bytes: int = 2**29
    min_number: int = 8


DEFAULT_SHARDS = ShardSizes()


class StoredLayers:
    """The layers and arrays of a snapshot, as its segments have them stored.

    Args:
        segments: The segments.
        content: The content of the snapshot.
        budget: The memory that reading may use.

    Attributes:
        dtypes: The type of each layer.

    Raises:
        ValueError: If the types of a layer differ, or a snapshot cannot hold the type.
    """

    def __init__(self, segments: Sequence[Segment], content: Content, budget: Budget) -> None:
        self._segments, self._content, self._budget = segments, content, budget
        self._stored = {
            name: [segment.layer(name, budget) for segment in segments] for name in content.layer_names
        }
        self.dtypes = {name: self._dtype_of(name) for name in content.layer_names}

    def bytes_per_row(self) -> dict[str, float]:
        """Return the approximate size of a row of each layer and of each array of `obsm`."""
        segment = max(self._segments, key=lambda segment: len(segment.ids.obs_joinids))
        found = {name: segment.bytes_per_row(name, self._budget) for name in self._content.layer_names}
        for name in self._content.obsm_names:
            array = segment.array(name)
            found[f"obsm {name}"] = float(array.n_cols * array.dtype.itemsize)
        return found

    def borders(self, bytes_per_row: float, sizes: ShardSizes) -> list[int]:
        """Return the borders of shards, which have whole tiles, unless a tile is too large for the budget.

        Args:
            bytes_per_row: Size of a row of the first layer.
            sizes: The sizes of shards.
        """
        size = max(bytes_per_row * self._content.n_obs / sizes.min_number, sizes.min_bytes)
        borders = [0]
        for segment, stored in zip(self._segments, self._stored[self._content.layer_names[0]], strict=True):
            tile = stored.row_tile
            n_bytes = min(max(min(size, sizes.max_bytes), tile * bytes_per_row), self._budget.windows / 4)
            found = shard_borders(segment.ids.obs_joinids // tile, max(1, int(n_bytes / bytes_per_row)))
            first = borders[-1]
            borders += [first + border for border in found]
        return borders

    def sample(self, bytes_per_row: float, n_bytes: int) -> list[CSR_IO_Buffer]:
        """Return neighbouring rows of the first layer, of about so many bytes; [] if there are no rows.

        Args:
            bytes_per_row: Size of a row of the first layer.
            n_bytes: Size of these rows.
        """
        segment = max(self._segments, key=lambda segment: len(segment.ids.obs_joinids))
        n_rows = len(segment.ids.obs_joinids)
        size = min(n_rows, max(1, int(min(n_bytes, self._budget.windows / 4) / bytes_per_row)))
        start = (n_rows - size) // 2
        borders = [(start, start + size)] if size else []
        name = self._content.layer_names[0]
        with closing(segment.shards(name, borders, n_pieces=1, budget=self._budget)) as shards:
            return [piece for rows in shards for piece in rows.pieces]

    def _dtype_of(self, name: str) -> str:
        """Return the type of a layer, which must be the same in all segments with rows."""
        pairs = list(zip(self._segments, self._stored[name], strict=True))
        pairs = [pair for pair in pairs if len(pair[0].ids.obs_joinids)] or pairs[:1]
        dtypes = {stored.dtype.str: segment.name for segment, stored in pairs}
        if len(dtypes) > 1:
            listed = ", ".join(f"{dtype} in {uri!r}" for dtype, uri in dtypes.items())
            raise ValueError(
                f"layer {name!r} must have one type in all queries, but has {listed}; make one snapshot each."
            )
        [dtype] = dtypes
        if dtype not in DTYPES:
            raise ValueError(
                f"layer {name!r} must have a type among {', '.join(DTYPES)}, not {dtype}; convert it."
            )
        return dtype


def shard_borders(tiles: NDArray[np.int64], n_rows: int) -> list[int]:
    """Return the ends of shards of about `n_rows` rows: between tiles, or within a tile that is larger."""
    starts = np.append(np.flatnonzero(np.diff(tiles, prepend=tiles[:1])), len(tiles))
    borders = [0]
    while borders[-1] < len(tiles):
        start = borders[-1]
        fits = starts[(starts > start) & (starts <= start + n_rows)]
        borders.append(int(fits[-1]) if len(fits) else min(start + n_rows, len(tiles)))
    return borders[1:]
