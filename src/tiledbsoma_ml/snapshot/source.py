"""`SnapshotSource`: the rows of a query, read from a snapshot, which is made when it is first needed."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pandas as pd

from tiledbsoma_ml._budget import Budget
from tiledbsoma_ml._common import NDArrayJoinId, absolute_path, cache_folder, check_names
from tiledbsoma_ml._order.sizes import ENOUGH_ROWS, Layout
from tiledbsoma_ml._query_ids import QueryIDs
from tiledbsoma_ml._source import Fields, RowsAndColumns, Source
from tiledbsoma_ml.snapshot.build import describe
from tiledbsoma_ml.snapshot.reader import SnapshotReader, TiledSnapshotReader
from tiledbsoma_ml.snapshot.segments import segment_of
from tiledbsoma_ml.snapshot.snapshot import Snapshot

CHUNK_ROWS = 64
"""Number of rows of a chunk of neighbours, if a size is "auto" and memory does not hold the snapshot.

A disk reads them twice as fast as single rows.
"""

POOL_SHARE = 16
"""Budget divided by the memory of earlier rows that a reader keeps for later ones."""

FIXED_BYTES = 2**25
"""Memory that decoding takes beside the rows, and columns of `obs`."""

HELD_SHARE = 4
"""The rest of the budget, divided by the memory of the rows that are decoded at once.

The rows before are given out meanwhile, and the memory of those before them is kept for the next ones.
"""


@attrs.frozen(kw_only=True, eq=False)
class _Request:
    """The rows and columns that a snapshot must have, and the source from which it is made.

    Attributes:
        origin: The source; None if the snapshot exists, and the user named no source.
        ids: Rows and columns of the query; None for all that the snapshot has.
        fields: The fields of each row beside `X`.
        layer_name: Layer of `X`; the default layer of the snapshot if None.
        memory_bytes: Budget of memory for making the snapshot.
    """

    origin: Source | None
    ids: QueryIDs | None
    fields: Fields
    layer_name: str | None
    memory_bytes: int

    def without_rows(self) -> _Request:
        """Return what a process needs that only reads the snapshot: no joinids, and no source in memory."""
        origin = self.origin
        if origin is not None:
            no_rows = attrs.evolve(origin.query_ids, obs_joinids=origin.query_ids.obs_joinids[:0])
            origin = None if origin.locator is None else origin.of_rows(no_rows)
        return attrs.evolve(self, origin=origin, ids=None)


class SnapshotSource(Source):
    """The rows of a query, read from a snapshot.

    Args:
        snapshot: The snapshot, or its path; True for a folder in the user's cache directory.
        of: The source from which the snapshot is made; None if the snapshot exists, and the user named none.
        ids: Rows and columns of the query; all that the snapshot has if None.
        fields: The fields of each row beside `X`.
        layer_name: Layer of `X`, if `of` does not decide it; the default layer of the snapshot if None.
        memory_bytes: Budget of memory for making the snapshot.

    Attributes:
        path: The folder of the snapshot.

    Raises:
        ValueError: If the snapshot exists and does not have the rows and columns of the query.
    """

    def __init__(
        self,
        snapshot: Snapshot | str | os.PathLike[str] | bool,
        *,
        of: Source | None,
        ids: QueryIDs | None,
        fields: Fields,
        layer_name: str | None,
        memory_bytes: int,
    ) -> None:
        self.locator = None if of is None else of.locator
        self._request = _Request(
            origin=of,
            ids=ids,
            fields=fields,
            layer_name=layer_name if self.locator is None else self.locator.layer_name,
            memory_bytes=memory_bytes,
        )
        self._content: Mapping[str, str] | None = None
        self._nullable: frozenset[str] | None = None
        self._snapshot = snapshot if isinstance(snapshot, Snapshot) else None
        self.path = snapshot.path if isinstance(snapshot, Snapshot) else self._path_of(snapshot)
        if self._snapshot is not None:
            self._check(self._snapshot)
        elif of is None or self.path.exists():
            self.prepare()
        self.query_ids = ids or self.snapshot.query_ids

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot, which is made if it does not exist.

        Raises:
            ValueError: If the path has another snapshot, perhaps one that was made just now.
        """
        if self._snapshot is None:
            request = self._request
            if request.origin is None or self.path.exists():
                found = Snapshot.open(self.path)
                self._check(found)
                self._snapshot = found
            else:
                assert request.ids is not None
                self._snapshot = Snapshot.create_from(
                    self.path,
                    [(request.origin, request.ids)],
                    obs_column_names=request.fields.obs_column_names,
                    memory_budget=request.memory_bytes,
                )
        return self._snapshot

    def prepare(self) -> None:
        """Make the snapshot if it does not exist."""
        _ = self.snapshot

    @property
    def content(self) -> Mapping[str, str]:
        """The content of the source from which the snapshot was made; if it is not known, the fingerprint."""
        if self._content is None:
            origin = self._request.origin
            self._content = {"snapshot": self.snapshot.fingerprint} if origin is None else origin.content
        return self._content

    def obs(self, obs_joinids: NDArrayJoinId, column_names: Sequence[str]) -> pd.DataFrame:
        """Return columns of `obs` for these rows, in this order, with a fresh index."""
        known = () if self._snapshot is None else ("soma_joinid", *self._snapshot.obs_column_names)
        if self._request.origin is not None and not set(column_names) <= set(known):
            return self._request.origin.obs(obs_joinids, column_names)
        nullable = self.snapshot.reader(self.query_ids.obs_joinids, None, column_names).nullable
        return self.snapshot.reader(None, None, column_names, nullable=nullable).obs(obs_joinids)

    def var(self, var_joinids: NDArrayJoinId, column_names: Sequence[str] | None = None) -> pd.DataFrame:
        """Return columns of `var` (all if None) for these columns of `X`, in order, with a fresh index."""
        if self._request.origin is not None:
            return self._request.origin.var(var_joinids, column_names)
        frame = self.snapshot.var
        known = [str(name) for name in frame]
        given = known if column_names is None else column_names
        names = check_names("column_names", given, known, of="a column of var in the snapshot")
        return frame.set_index("soma_joinid", drop=False).loc[var_joinids, list(names)].reset_index(drop=True)

    def check(self, ids: QueryIDs, fields: Fields) -> None:
        """Raise a ValueError or TypeError unless these rows, columns and fields exist."""
        known = ["soma_joinid", *self._request.fields.obs_column_names]
        what = "a column of obs that the snapshot was asked for"
        check_names("obs_column_names", fields.obs_column_names, known, of=what)
        if self._request.origin is not None:
            self._request.origin.check(ids, fields)

    def of_rows(self, ids: QueryIDs) -> Source:
        """Return a source of these rows only; this one if the snapshot is still to be made of all rows."""
        if self._snapshot is None:
            return self
        source = copy.copy(self)
        source.query_ids = ids
        return source

    @property
    def row_tile(self) -> int:
        """Number of neighbouring rows that are decoded together; 1 if the snapshot is not compressed."""
        tiling = None if self._snapshot is None else self._snapshot.tiling(self._request.layer_name)
        return 1 if tiling is None else tiling.row_tile

    def layout(self, ids: QueryIDs, budget: Budget) -> Layout:
        """Return how the rows are stored; each can be read by itself if memory holds the snapshot.

        A compressed snapshot is decoded block by block, as many blocks at once as memory holds.
        """
        if tiling := self.snapshot.tiling(self._request.layer_name):
            return Layout(tiling.row_tile, tiling.row_bytes, tiling.n_rows_in(_held_bytes(budget)))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        n_bytes = self.snapshot.nbytes
        row_tile = 1 if n_bytes < memory / 2 else CHUNK_ROWS
        return Layout(row_tile, n_bytes / max(1, len(self.snapshot)), ENOUGH_ROWS)

    def open(
        self, ids: RowsAndColumns, fields: Fields, budget: Budget
    ) -> SnapshotReader | TiledSnapshotReader:
        """Return a reader, which the caller closes after an epoch."""
        tiling = self.snapshot.tiling(self._request.layer_name)
        kept = 0 if tiling is None else _held_bytes(budget)  # the memory of one read is that of the next
        reader = self.snapshot.reader(
            var_joinids=ids.var_joinids,
            obs_column_names=fields.obs_column_names,
            layer_name=self._request.layer_name,
            nullable=self._obs_nullable(),
            pool_bytes=budget.total // POOL_SHARE + kept,
        )
        return reader if tiling is None else TiledSnapshotReader(reader, tiling, _held_bytes(budget))

    def _path_of(self, snapshot: str | os.PathLike[str] | bool) -> Path:
        if not isinstance(snapshot, bool):
            return absolute_path(snapshot, "snapshot")
        request = self._request
        if request.origin is None or request.ids is None:
            raise ValueError("snapshot=True needs a query to make it of; name the folder of a snapshot.")
        content = describe(
            [segment_of(request.origin, request.ids)],
            obs_column_names=request.fields.obs_column_names,
            layers=(),
            obsm=(),
        )
        return cache_folder() / f"{content.fingerprint}.snapshot"

    def _check(self, snapshot: Snapshot) -> None:
        """Raise a ValueError unless a snapshot has the query; note the nullable columns of `obs`."""
        request, names = self._request, self._request.fields.obs_column_names
        if request.origin is not None:
            snapshot.check_holds(request.origin, names)
        ids = request.ids or snapshot.query_ids
        found = snapshot.reader(ids.obs_joinids, ids.var_joinids, names, layer_name=request.layer_name)
        self._nullable = found.nullable

    def _obs_nullable(self) -> frozenset[str]:
        """Return the nullable columns of `obs`, which are decided once for the query, as by `ObsTypes`."""
        if self._nullable is None:
            rows, names = self.query_ids.obs_joinids, self._request.fields.obs_column_names
            self._nullable = self.snapshot.reader(rows, None, names).nullable
        return self._nullable

    def __getstate__(self) -> dict[str, Any]:
        if self._snapshot is None:  # the process that makes it needs all rows
            return self.__dict__
        self._obs_nullable()
        if self.locator is None:
            _ = self.content  # it cannot be found later, without the source
        return self.__dict__ | {"_request": self._request.without_rows()}


def _held_bytes(budget: Budget) -> int:
    return max(0, budget.total - budget.mini_batch_bytes - FIXED_BYTES) // HELD_SHARE
